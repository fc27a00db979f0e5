"""titan-lite plan recalibrate, on the records of a run."""

import json
from pathlib import Path

import pytest

from titan_lite import cli
from titan_lite.models.plan import make_plan
from titan_lite.planner.cluster import FOLDER, find_cluster
from titan_lite.planner.predict import predict
from titan_lite.planner.read import read_job


def run_folder(folder: Path, records: list[dict[str, float]], *overrides: str) -> Path:
    plan = make_plan(None, overrides, 1, with_files=False)
    mesh = {axis: getattr(plan.dims, axis) for axis in plan.dims.AXES}
    facts = {"config": plan.config.model_dump(), "mesh": mesh}
    (folder / "run.json").write_text(json.dumps(facts))
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
    return folder


RECORDS = [
    {"step": 1, "seconds_per_step": 9.0, "warmup": True},
    {"step": 10, "seconds_per_step": 2.0, "data_wait": 50.0},
    {"step": 20, "seconds_per_step": 1.0, "data_wait": 0.0},
    {"step": 30, "seconds_per_step": 4.0, "data_wait": 0.0},
]


def test_a_run_gives_the_factor_that_makes_its_prediction_right(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_folder(tmp_path, RECORDS)
    assert cli.main(["plan", "recalibrate", str(folder), "--cluster=h100", "--json"]) == 0
    actual = json.loads(capsys.readouterr().out)
    # Start-up and waiting for data are excluded.
    assert actual["measured_seconds"] == 1.0
    own = tmp_path / "own.toml"
    text = (FOLDER / "h100.toml").read_text()
    own.write_text(f'{text}\n[measured]\n"{actual["constant"]}" = {actual["value"]}\n')
    plan = make_plan(None, [], 1, with_files=False)
    job = read_job(plan)
    assert predict(job, find_cluster(str(own)), 1.0).step.seconds == pytest.approx(1.0, rel=1e-3)
    # Once more, from the recalibrated prediction.
    assert cli.main(["plan", "recalibrate", str(folder), f"--cluster={own}"]) == 0
    assert f'"{actual["constant"]}" = ' in capsys.readouterr().out


def test_the_runs_own_cluster_is_the_default(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_folder(tmp_path, RECORDS, "--job.cluster=a100")
    results = []
    for options in ([], ["--cluster=a100"], ["--cluster=h100"]):
        assert cli.main(["plan", "recalibrate", str(tmp_path), "--json", *options]) == 0
        results.append(json.loads(capsys.readouterr().out))
    assert results[0] == results[1] != results[2]


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (RECORDS[:2], "1 records after start-up; at least 3 are required"),
        (None, "finished run: run.json cannot be read: No such file or directory"),
    ],
)
def test_a_folder_without_records_is_one_message(
    records: list[dict[str, float]] | None,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if records is not None:
        run_folder(tmp_path, records)
    assert cli.main(["plan", "recalibrate", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("seconds", ["1.0", None, 0.0, -1.0])
def test_records_without_seconds_do_not_count(
    seconds: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_folder(tmp_path, [{"step": 1, "seconds_per_step": seconds}] * 4)  # type: ignore[dict-item]
    assert cli.main(["plan", "recalibrate", str(tmp_path)]) == 2
    assert "0 records after start-up; at least 3 are required" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[]", "is not a JSON object"),
        ("5", "is not a JSON object"),
        ("{", "is not JSON"),
        ("{}", 'run.json has no "config"'),
        ('{"config": {"job": 5}}', "run.json was not written by a run"),
        ('{"config": 5}', "run.json was not written by a run"),
    ],
)
def test_a_run_file_that_is_none_is_one_message(
    text: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_folder(tmp_path, RECORDS)
    (tmp_path / "run.json").write_text(text)
    assert cli.main(["plan", "recalibrate", str(tmp_path)]) == 2
    message = f"titan-lite: {tmp_path} must be the folder of a finished run: "
    error = capsys.readouterr().err
    assert message in error
    assert reason in error
