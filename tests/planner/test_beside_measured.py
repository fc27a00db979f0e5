"""job.cluster: predicted next to measured values, in run.json and at the end of a run."""

import dataclasses
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from titan_lite import cli
from titan_lite.models.plan import make_plan
from titan_lite.planner.cluster import find_cluster
from titan_lite.planner.predict import predict
from titan_lite.planner.read import read_job
from titan_lite.training.prediction import PredictionRecorder


@pytest.mark.parametrize("measured", [None, 2.0])
def test_measured_values_join_the_prediction_once_there_are_any(
    measured: float | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plan = make_plan(None, [f"--job.dump_folder={tmp_path}"], 1, with_files=False)
    (tmp_path / "run.json").write_text('{"device": "d"}')
    cluster = find_cluster("h100")
    kind = "resident in one process"
    meter: Any = SimpleNamespace(seconds_per_step=measured, peak_memory_gib=3.0, memory_kind=kind)

    def prediction() -> dict[str, Any]:
        run: dict[str, Any] = json.loads((tmp_path / "run.json").read_text())
        assert run["device"] == "d"
        actual: dict[str, Any] = run["prediction"]
        return actual

    step = predict(read_job(plan), cluster, 1.0).step
    # A device on which the predicted step takes a second.
    cluster = dataclasses.replace(cluster, measured={"step": 1 / step.seconds})
    with caplog.at_level(logging.INFO), PredictionRecorder(plan, cluster, meter):
        assert prediction()["measured"] == {}
    actual = prediction()
    assert actual["cluster"] == "h100"
    assert actual["predicted"]["seconds_per_step"] == pytest.approx(1.0)
    low, high = actual["predicted"]["seconds_80"]
    assert low < 1.0 < high
    if measured is None:
        assert (actual["measured"], caplog.messages) == ({}, [])
        return
    assert actual["measured"] == {"seconds_per_step": 2.0, "memory_gib": 3.0}
    assert "Predicted for h100: 1 s per step" in caplog.text
    assert "measured: 2 s (+100 %)" in caplog.text
    assert "measured: 3.00 GiB resident in one process" in caplog.text


@pytest.mark.parametrize("command", [["config", "--preflight"], ["train"]])
def test_an_unknown_cluster_is_one_message(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "c.toml"
    file.write_text('[job]\ncluster = "h1000"\n')
    assert cli.main([*command, str(file)]) == 2
    err = capsys.readouterr().err
    assert "titan-lite: 1 problem in the configuration" in err
    assert f'job.cluster ({file}): no cluster "h1000"; did you mean "h100"' in err


@pytest.mark.parametrize("command", [["plan"], ["plan", "search", "--world-size=2"]])
def test_the_planner_reports_where_a_wrong_cluster_is_named(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*command, "--job.cluster=h1000"]) == 2
    assert 'job.cluster (command line): no cluster "h1000"' in capsys.readouterr().err


def test_a_wrong_cluster_is_reported_together_with_other_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = (f"--data.tokenizer_path={tmp_path}", "--job.cluster=h1000")
    assert cli.main(["config", "--preflight", *wrong]) == 2
    err = capsys.readouterr().err
    assert "titan-lite: 2 problems in the configuration" in err
    assert 'job.cluster         (command line): no cluster "h1000"' in err
    assert "data.tokenizer_path (command line): " in err


def test_plan_predicts_for_the_cluster_of_the_job(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--job.cluster=b200", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cluster"] == "b200"
    assert cli.main(["plan", "--job.cluster=b200", "--cluster=a100", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cluster"] == "a100"
