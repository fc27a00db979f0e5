"""run_train.sh as a user starts it: a real shell, torchrun, processes and files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import read_metrics

ROOT = Path(__file__).parent.parent


def launch(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the launcher with this interpreter's environment active."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["./run_train.sh", *arguments],
        cwd=ROOT,
        env={**os.environ, "PATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.mark.distributed
def test_the_default_command_trains_and_reports_where_everything_is(tmp_path: Path) -> None:
    folder = tmp_path / "a run"
    result = launch(
        "--training.steps=3",
        "--training.seq_len=64",
        "--metrics.log_freq=1",
        '--job.description="two words, quoted"',
        f"--job.dump_folder={folder}",
    )
    assert result.returncode == 0, result.stdout + result.stderr
    run = json.loads((folder / "run.json").read_text())
    assert run["config"]["job"]["description"] == "two words, quoted"
    assert run["mesh"]["dp_shard"] == 2
    assert [record["step"] for record in read_metrics(folder)] == [1, 2, 3]
    summary = result.stdout.splitlines()[-6:]
    assert str(folder) in summary[0]
    starts = ["loss", "WPS", "MFU", "peak memory", "wall time"]
    for line, start in zip(summary[1:], starts, strict=True):
        assert line.startswith(start)


def test_mistakes_in_the_configuration_give_one_block_and_exit_code_2(tmp_path: Path) -> None:
    config = tmp_path / "my.toml"
    config.write_text("[training]\nstpes = 3\n")
    result = launch(str(config), "--training.seq_len=-5", "--parallel.tp=two")
    assert result.returncode == 2
    assert f"training.stpes   ({config})" in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("titan-lite: 3 problems in the configuration")
    assert 'did you mean "training.steps"' in result.stderr


def test_the_world_size_that_is_launched_is_the_one_that_is_checked() -> None:
    result = launch("--parallel.dp_shard=3", NGPU="4")
    assert result.returncode == 2
    assert "4" in result.stderr
    result = launch("--parallel.dp_shard=3", NGPU="4", NNODES="2")
    assert "8" in result.stderr


def test_several_nodes_need_a_place_to_meet() -> None:
    result = launch(NNODES="2")
    assert result.returncode != 0
    assert "set RDZV_ENDPOINT or MASTER_ADDR" in result.stderr


@pytest.mark.distributed
def test_two_nodes_meet_at_the_rendezvous_endpoint(tmp_path: Path) -> None:
    """Two launchers on this machine stand for two nodes."""
    command = (
        "NGPU=1 NNODES=2 ./run_train.sh --training.steps=2 --training.seq_len=64 "
        f"--job.dump_folder={tmp_path / 'run'} "
    )
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "RDZV_ENDPOINT": "localhost:29611"}
    nodes = [subprocess.Popen(["bash", "-c", command], cwd=ROOT, env=environment) for _ in range(2)]
    assert [node.wait(timeout=240) for node in nodes] == [0, 0]
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["mesh"]["dp_shard"] == 2


@pytest.mark.parametrize("script", ["run_train.sh", "run_tests.sh", "scripts/environment.sh"])
def test_the_shell_scripts_parse(script: str) -> None:
    subprocess.run(["bash", "-n", script], cwd=ROOT, check=True)


def test_mistakes_in_files_are_answered_before_any_process_starts(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_text("IQ== 7")
    result = launch(
        "--data.split=test",
        "--checkpoint.enable=true",
        "--checkpoint.load_step=99",
        f"--data.tokenizer_path={tmp_path / 'tokenizer.model'}",
        f"--job.dump_folder={tmp_path}",
    )
    assert result.returncode == 2
    assert result.stderr.startswith("titan-lite: 3 problems in the configuration")
    for part in ("data.split ", "line 1: expected", "no checkpoint of step 99"):
        assert part in result.stderr
    assert "Traceback" not in result.stderr


def test_help_explains_the_variables_and_wrong_counts_are_refused() -> None:
    result = launch("--help")
    assert result.returncode == 0
    assert "CONFIG_FILE" in result.stdout
    assert launch(NGPU="abc").stderr == "NGPU and NNODES are numbers from 1 on, not 'abc'\n"
    assert launch("--schema").returncode == 2


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        ([], {}, "usage: python -m titan_lite.train CONFIG"),
        (["--training.steps=1"], {}, "usage: python -m titan_lite.train CONFIG"),
        (["train_configs/debug.toml"], {"RANK": "0"}, "MASTER_ADDR (environment): not set"),
    ],
)
def test_the_process_says_what_it_needs(
    arguments: list[str], environment: dict[str, str], message: str
) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "titan_lite.train", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert message in result.stderr.replace("  ", " ")


def test_all_mistakes_of_all_kinds_are_answered_together() -> None:
    result = launch(
        "--job.x=1",
        "--data.dataset_path=nope",
        "--parallel.dp_replicate=2",
        "--model.name=foo",
        NGPU="3",
    )
    assert result.returncode == 2
    assert result.stderr.startswith("titan-lite: 4 problems in the configuration")
