"""benchmarks/checkpoint.py, on a tiny model."""

import json
from pathlib import Path

import pytest

from benchmarks import checkpoint
from tests.test_benchmarks import DEBUG, ROOT, TINY_MODEL


def test_every_mode_is_measured_beside_a_plain_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    output = tmp_path / "checkpoint.json"
    arguments = ["--saves=1", "--interval=4", "--modes", "disabled", "async", f"--output={output}"]
    assert checkpoint.main([DEBUG, *arguments, f"--folder={tmp_path}", *TINY_MODEL]) == 0
    results = json.loads(output.read_text())["results"]
    assert [result["mode"] for result in results] == ["disabled", "async"]
    for result in results:
        # 12 bytes for each parameter.
        assert result["bytes"] > 12 * 300_000
        blocked = result["blocked_over_step"] * result["seconds_per_step"]
        assert blocked == pytest.approx(result["blocked_seconds"], rel=0.05, abs=0.001)
        speed = result["bytes"] / result["save_seconds"] / 1e9
        assert result["gb_per_second"] == pytest.approx(speed, rel=0.3)
        assert result["over_plain"] > 0
        assert result["resume_seconds"] > result["of_which_loading_from_memory"] > 0


def test_only_the_seconds_of_a_save_count_as_lost() -> None:
    costs = {
        "checkpoint_blocked_seconds": 0.5,
        "checkpoint_seconds": 2.0,
        "checkpoint_bytes": 4e9,
        "checkpoint_gb_per_second": 2.0,
    }
    seconds = [9.0, 1.0, 1.0, 1.0, 1.2, 1.3, 5.0, 1.0]
    records = [{"step": step, "seconds_per_step": s} for step, s in enumerate(seconds, start=1)]
    records[5] |= costs
    actual = checkpoint.summarize(records, interval=4)
    assert actual["blocked_over_step"] == 0.5
    assert actual["lost_over_step"] == 1.0
    assert actual["gb_per_second"] == 2.0


def test_a_mistake_in_the_configuration_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert checkpoint.main([str(ROOT / DEBUG), "--training.stpes=3"]) == 2
    assert 'did you mean "training.steps"?' in capsys.readouterr().err
