"""Seeds, garbage collection, timeouts and the run folder."""

import gc
import importlib.util
import json
import os
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.distributed import Workers
from titan_lite.runtime.distributed import check_dtype, is_emulated, set_timeout
from titan_lite.runtime.garbage import GarbageCollector
from titan_lite.runtime.log import SAME_ON_ALL_RANKS
from titan_lite.runtime.run_folder import (
    git_commit,
    open_run_folder,
    update_run_file,
    write_run_file,
)
from titan_lite.runtime.seed import derive_seed


def test_derived_seeds_never_change_and_differ_by_seed_and_name() -> None:
    # A changed value would change the weights of every run that ever was.
    assert derive_seed(0, "norm.weight") == 3125039522032665540
    seeds = {derive_seed(s, name) for s in range(3) for name in ("a", "b", "1/a")}
    assert len(seeds) == 9
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_garbage_is_collected_every_so_many_steps_and_not_in_between() -> None:
    class Cycle:
        pass

    def is_collected_at(step: int) -> bool:
        cycle = Cycle()
        cycle.itself = cycle  # type: ignore[attr-defined]
        reference = weakref.ref(cycle)
        del cycle
        collector.after_step(step)
        return reference() is None

    with GarbageCollector(2) as collector:
        assert not gc.isenabled()
        assert not is_collected_at(1)
        assert is_collected_at(2)
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def _wait_in_vain() -> str:
    set_timeout(1)
    try:
        if dist.get_rank() == 0:
            dist.all_reduce(torch.zeros(1))
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.distributed
def test_the_timeout_that_was_set_ends_a_collective_that_waits_in_vain(tmp_path: Path) -> None:
    # Separate workers: a timeout leaves the group unusable.
    with Workers(2, tmp_path) as lonely:
        answers = lonely.run(_wait_in_vain)
    assert "1000" in answers[0] or "imed out" in answers[0]


def test_the_run_file_names_versions_and_commit(tmp_path: Path) -> None:
    write_run_file(tmp_path, {"mesh": {"dp_shard": 2}})
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["versions"]["torch"] == torch.__version__
    assert run["git_commit"] == git_commit()
    assert run["environment"]["threads"] == torch.get_num_threads()
    assert run["mesh"] == {"dp_shard": 2}


def _segments(folder: Path) -> list[tuple[int, float]]:
    run = json.loads((folder / "run.json").read_text())
    assert {"started", "versions", "git_commit", "environment"} <= run["segments"][-1].keys()
    assert "applied" not in run["segments"][-1]
    return [(segment["resumed_from_step"], segment["lr"]) for segment in run["segments"]]


def test_the_run_file_has_a_record_for_each_part_between_two_resumes(tmp_path: Path) -> None:
    for step, lr in ((0, 0.1), (4, 0.2), (8, 0.3)):
        write_run_file(tmp_path, {"lr": lr, "applied": {}}, resumed_from_step=step)
    update_run_file(tmp_path, {"applied": {"blocks": 2}})
    assert _segments(tmp_path) == [(0, 0.1), (4, 0.2), (8, 0.3)]
    # Steps 5 to 8 are trained once more.
    write_run_file(tmp_path, {"lr": 0.4}, resumed_from_step=4)
    assert _segments(tmp_path) == [(0, 0.1), (4, 0.4)]
    assert json.loads((tmp_path / "run.json").read_text())["lr"] == 0.4


def test_a_run_file_without_segments_or_damaged_does_not_keep_a_run_from_resuming(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_run_file(tmp_path, {"lr": 0.1}, resumed_from_step=2)
    older = json.loads((tmp_path / "run.json").read_text())
    del older["segments"]
    (tmp_path / "run.json").write_text(json.dumps(older))
    write_run_file(tmp_path, {"lr": 0.2}, resumed_from_step=4)
    assert _segments(tmp_path) == [(2, 0.1), (4, 0.2)]
    assert not caplog.records
    for damaged in ('{"started": "20', "[]", '{"segments": [{}]}'):
        (tmp_path / "run.json").write_text(damaged)
        write_run_file(tmp_path, {"lr": 0.3}, resumed_from_step=6)
        assert _segments(tmp_path) == [(6, 0.3)]
        assert "run.json is damaged; its record of earlier starts of this run is" in caplog.text
        caplog.clear()


def test_only_what_a_run_wrote_is_moved_aside(tmp_path: Path) -> None:
    for name in ("run.json", "metrics.jsonl", "notes.txt"):
        (tmp_path / name).write_text("{}")
    open_run_folder(tmp_path, resume_step=3)
    assert (tmp_path / "run.json").exists()
    open_run_folder(tmp_path, resume_step=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "previous"]
    (earlier,) = (tmp_path / "previous").iterdir()
    assert sorted(path.name for path in earlier.iterdir()) == ["metrics.jsonl", "run.json"]


def test_runs_of_one_second_are_moved_to_folders_of_their_own(tmp_path: Path) -> None:
    for _ in range(3):
        (tmp_path / "run.json").write_text("{}")
        os.utime(tmp_path / "run.json", (0, 0))
        open_run_folder(tmp_path, resume_step=0)
    first, second, third = sorted(path.name for path in (tmp_path / "previous").iterdir())
    assert (second, third) == (f"{first}-2", f"{first}-3")


def test_a_gpu_without_bfloat16_is_told_to_use_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla V100")
    with pytest.raises(ValueError, match='Tesla V100 does not support bfloat16; use "float16"'):
        check_dtype("bfloat16", cuda)
    check_dtype("float16", cuda)
    check_dtype("bfloat16", torch.device("cpu"))


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_a_type_without_matrix_products_on_this_processor_is_emulated(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    support = {"bfloat16": "_is_mkldnn_bf16_supported", "float16": "_is_mkldnn_fp16_supported"}
    for supported in (False, True):
        monkeypatch.setattr(torch.ops.mkldnn, support[name], lambda: supported)  # noqa: B023
        assert is_emulated(name, torch.device("cpu")) is not supported
        assert not is_emulated(name, torch.device("cuda"))
        assert not is_emulated("float32", torch.device("cpu"))


def test_warnings_that_only_rank_0_logs_are_those_of_modules() -> None:
    """A module that moves takes its name along."""
    names = [f"titan_lite.{name}" for name in SAME_ON_ALL_RANKS]
    assert [name for name in names if importlib.util.find_spec(name) is None] == []
