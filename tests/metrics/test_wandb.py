"""The sink for W&B against wandb itself, offline: what lies in its file afterwards."""

import importlib.util
import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.metrics.test_sinks import destination, record
from titan_lite.metrics.record import scalars
from titan_lite.metrics.sinks import WandbSink

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("wandb") is None, reason="the extra wandb is not installed"
)
TOKEN = "0123456789abcdef0123456789abcdef01234567"
# Files of records have LevelDB's log format; https://github.com/google/leveldb doc/log_format.md.
BLOCK, FULL, LAST = 32768, 1, 4


def payloads(path: Path) -> Iterator[bytes]:
    data, at, whole = path.read_bytes(), 7, b""
    assert data.startswith(b":W&B")
    while at + 7 <= len(data):
        if (left := BLOCK - at % BLOCK) < 7:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (FULL, LAST):
            yield whole
            whole = b""


def read(path: Path) -> tuple[str, dict[int, dict[str, float]]]:
    """The run's id, and its scalars by step."""
    from wandb.proto.wandb_internal_pb2 import Record

    run_id, history = "", {}
    for payload in payloads(path):
        one = Record()
        one.ParseFromString(payload)
        run_id = one.run.run_id or run_id
        if one.HasField("history"):
            values = {
                item.key or item.nested_key[0]: json.loads(item.value_json)
                for item in one.history.item
            }
            step = values["_step"]
            history[step] = {key: v for key, v in values.items() if not key.startswith("_")}
    return run_id, history


def test_wandb_keeps_names_values_and_the_run_but_no_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_API_KEY", TOKEN)
    import wandb

    for first in (1, 21):
        sink = WandbSink(destination(tmp_path, {"training": {"steps": 100}}))
        for step in (first, first + 9):
            sink.write(record(step, warmup=step == first, **{"validation/loss": 7.5}))
        sink.close()
    wandb.teardown()
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    (first_id, before), (second_id, after) = map(read, files)
    assert first_id == second_id == (tmp_path / "wandb/run_id").read_text()
    assert [*before, *after] == [1, 10, 21, 30]
    assert before[10] == pytest.approx(scalars(record(10, **{"validation/loss": 7.5})))
    assert "speed/wps" not in before[1]
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(TOKEN.encode() in path.read_bytes() for path in written)
