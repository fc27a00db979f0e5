"""run_train.sh as a user starts it: a real shell, processes, signals and files."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import GUARD
from tests.runs import read_metrics
from tests.runtime.test_parent import wait_for_end
from titan_lite import cli
from titan_lite import launch as launcher
from titan_lite.config.arguments import UsageError, split_arguments
from titan_lite.launch import POLL_SECONDS, Settings, loopback, read_endpoint
from titan_lite.regression.run_training import run_training
from titan_lite.runtime.log import is_first_to_print
from titan_lite.runtime.python import PYTHON

ROOT = Path(__file__).parent.parent
# Commands of coreutils that the scripts use. A slim container has these, bash and Python.
COREUTILS = "cat cksum cp dirname env mkdir mktemp readlink rm touch uname"


def launch(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the launcher with this interpreter's environment active."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["./run_train.sh", *arguments],
        cwd=ROOT,
        env={**os.environ, "PATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=GUARD,
        check=False,
    )


@pytest.fixture
def slim(tmp_path: Path) -> str:
    """A PATH with nothing but bash, coreutils and Python."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("bash", *COREUTILS.split()):
        program = shutil.which(name)
        assert program is not None, name
        (folder / name).symlink_to(program)
    # A link would not be known to belong to a virtual environment.
    (folder / "python3").write_text(f'#!{folder}/bash\nexec "{sys.executable}" "$@"\n')
    (folder / "python3").chmod(0o755)
    return str(folder)


@pytest.mark.distributed
def test_the_default_command_trains_and_reports_where_everything_is(
    tmp_path: Path, slim: str
) -> None:
    """In a slim container, through a symbolic link from elsewhere."""
    folder = tmp_path / "a run"
    (tmp_path / "link").symlink_to(ROOT / "run_train.sh")
    (tmp_path / "train").symlink_to("link")
    result = subprocess.run(
        [
            "./train",
            "--training.steps=3",
            "--training.seq_len=64",
            "--metrics.log_freq=1",
            '--job.description="two words, quoted"',
            f"--job.dump_folder={folder}",
        ],
        cwd=tmp_path,
        env={**os.environ, "PATH": slim},
        capture_output=True,
        text=True,
        timeout=GUARD,
        check=False,
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
    assert "NNODES > 1 requires RDZV_ENDPOINT or MASTER_ADDR" in result.stderr


@pytest.mark.distributed
@pytest.mark.slow
def test_two_nodes_meet_at_the_rendezvous_endpoint(tmp_path: Path) -> None:
    """Two launchers on this machine stand for two nodes."""
    command = (
        "NGPU=1 NNODES=2 ./run_train.sh --training.steps=2 --training.seq_len=64 "
        f"--job.dump_folder={tmp_path / 'run'} "
    )
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "RDZV_ENDPOINT": f"localhost:{free_port()}"}
    nodes = [subprocess.Popen(["bash", "-c", command], cwd=ROOT, env=environment) for _ in range(2)]
    assert [node.wait(timeout=GUARD) for node in nodes] == [0, 0]
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["mesh"]["dp_shard"] == 2


@pytest.mark.parametrize("script", ["run_train.sh", "run_tests.sh", "scripts/environment.sh"])
def test_the_shell_scripts_parse(script: str) -> None:
    parsed = subprocess.run(["bash", "-n", script], cwd=ROOT, capture_output=True, text=True)
    assert (parsed.returncode, parsed.stderr) == (0, "")


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
    for part in ("data.split ", "its first line is not", "no checkpoint of step 99"):
        assert part in result.stderr
    assert "Traceback" not in result.stderr


def test_help_explains_the_variables_and_wrong_counts_are_refused() -> None:
    result = launch("--help")
    assert result.returncode == 0
    assert "CONFIG_FILE" in result.stdout
    # A word of a value is not an option.
    assert launch("--job.description=tries -h or --help now", "--x=1").returncode == 2
    assert launch(NGPU="abc").stderr == "titan-lite: NGPU must be an integer >= 1, got 'abc'\n"
    assert launch("--schema").returncode == 2


# Variables that a launcher sets.
LAUNCHED = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        ([], {}, "usage: titan-lite train CONFIG"),
        (["--training.steps=1"], {}, "usage: titan-lite train CONFIG"),
        (["train_configs/debug.toml"], {"RANK": "0"}, "MASTER_ADDR (environment): not set"),
        (
            ["train_configs/debug.toml"],
            {**LAUNCHED, "RANK": "2"},
            "RANK (environment): must be an integer from 0 to 1, got '2'",
        ),
        (
            ["train_configs/debug.toml"],
            {**LAUNCHED, "RANK": ""},
            "RANK (environment): must be an integer from 0 to 1, got ''",
        ),
        (
            ["train_configs/debug.toml"],
            {**LAUNCHED, "WORLD_SIZE": "two"},
            "WORLD_SIZE (environment): must be an integer from 1 to 2147483647, got 'two'",
        ),
        (
            ["train_configs/debug.toml"],
            {**LAUNCHED, "MASTER_PORT": "tcp"},
            "MASTER_PORT (environment): must be an integer from 0 to 65535, got 'tcp'",
        ),
        # Empty is not set.
        (["absent.toml"], {"WORLD_SIZE": ""}, "absent.toml: no such file"),
        (["train_configs/debug.toml"], {"WORLD_SIZE": "2"}, "WORLD_SIZE (environment): is 2, but"),
        (["train_configs/debug.toml"], {"PMI_SIZE": "8"}, "PMI_SIZE (environment): is 8, but RANK"),
        (
            ["train_configs/debug.toml"],
            {"SLURM_PROCID": "3", "SLURM_NTASKS": "8"},
            "SLURM_NTASKS (environment): is 8, but RANK is not set: every process would train "
            "alone. Start them with run_train.sh or torchrun, once per node; for a single process, "
            "unset SLURM_NTASKS",
        ),
        (["train_configs/debug.toml"], {"PMI_RANK": "0"}, "PMI_RANK (environment): is 0, but RANK"),
        (
            ["train_configs/debug.toml"],
            {"MV2_COMM_WORLD_RANK": "0", "MV2_COMM_WORLD_SIZE": "2"},
            "MV2_COMM_WORLD_SIZE (environment): is 2, but RANK",
        ),
        (["absent.toml"], {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}, "no such"),
        # A batch script is one process of a job of any size.
        (
            ["absent.toml"],
            {"ENVIRONMENT": "BATCH", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"},
            "absent.toml: no such file",
        ),
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


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"WORLD_SIZE": "4"},
            "WORLD_SIZE is 4, but run_train.sh starts 2 processes per node (NNODES is 1)",
        ),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, "SLURM_NTASKS is 2, but"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "NNODES": "2"}, "SLURM_NTASKS is 1, but"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "with NNODES, or unset OMPI_COMM_WORLD_SIZE"),
        ({"PMI_RANK": "0"}, "PMI_RANK is 0, but"),
    ],
)
def test_a_launcher_that_others_start_several_times_is_refused(
    environment: dict[str, str], message: str
) -> None:
    result = launch("absent.toml", DEVICE="cpu", NGPU="2", **environment)
    assert result.returncode == 2
    assert message in result.stderr


@pytest.mark.parametrize(
    "environment",
    [
        {"WORLD_SIZE": "2"},
        {"WORLD_SIZE": "1", "RANK": "0"},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "PMI_RANK": "0", "PMI_SIZE": "1"},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "ENVIRONMENT": "BATCH"},
        {"SLURM_NTASKS": "8"},
    ],
)
def test_a_launcher_that_is_started_once_per_node_is_not_refused(
    environment: dict[str, str],
) -> None:
    result = launch("absent.toml", DEVICE="cpu", NGPU="2", **environment)
    assert "absent.toml: no such file" in result.stderr


@pytest.mark.parametrize("variable", ["TITAN_LITE_MESSAGES", "TORCHELASTIC_ERROR_FILE"])
def test_a_message_is_printed_by_one_process_of_a_node(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str
) -> None:
    """By that of torchrun as well, however late the others come."""

    def is_first(attempt: str, rank: str, text: str) -> bool:
        folder = tmp_path / attempt
        (folder / rank).mkdir(parents=True, exist_ok=True)
        place = folder / rank / "error.json" if "ERROR_FILE" in variable else folder
        monkeypatch.setenv(variable, str(place))
        return is_first_to_print(text)

    assert is_first("attempt_0", "0", "a mistake")
    assert not is_first("attempt_0", "1", "a mistake")
    assert is_first("attempt_0", "1", "another one")
    assert is_first("attempt_1", "0", "a mistake")


def test_all_broken_rules_are_reported_together_and_unknown_keys_before_them() -> None:
    broken = ("--data.dataset_path=nope", "--parallel.dp_replicate=2", "--model.name=foo")
    for arguments, count in ((broken, "3 problems"), ((*broken, "--job.x=1"), "1 problem")):
        result = launch(*arguments, NGPU="3")
        assert result.returncode == 2
        assert result.stderr.startswith(f"titan-lite: {count} in the configuration")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["my.toml", "--training.steps", "3"],
            "'3' is not an override: write --training.steps=3",
        ),
        (["--training.steps", "3"], "'3' is not an override: write --training.steps=3"),
        (
            ["--training.steps", "=", "3"],
            "'=' is not an override: write --training.steps=VALUE (without spaces)",
        ),
        (
            ["--training.steps", "=3"],
            "'=3' is not an override: write --training.steps=3 (without spaces)",
        ),
        (
            ["--training.steps=", "3"],
            "'3' is not an override: write --training.steps=3 (without spaces)",
        ),
        ([""], "an argument is empty; perhaps it is a shell variable that is not set"),
        (["a.toml", ""], "an argument is empty; perhaps it is a shell variable that is not set"),
        (
            ["a.toml", "\N{EM DASH}training.steps=3"],
            "'\N{EM DASH}training.steps=3' starts with a dash instead of two hyphens: "
            "--training.steps=3",
        ),
        (["a.toml", "a.b=1"], "'a.b=1' is not an override: write --a.b=1"),
        (["a.toml", "b.toml"], "expected one configuration, got a.toml and b.toml"),
        (["--a.b=1", "a.toml", "3"], "expected one configuration, got a.toml and 3"),
    ],
)
def test_arguments_that_are_neither_a_configuration_nor_overrides_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError) as error:
        split_arguments(arguments)
    assert str(error.value) == message
    for command in (["config"], ["train"]):
        assert cli.main([*command, *arguments]) == 2
        assert message in capsys.readouterr().err


def test_modules_in_the_current_folder_are_not_imported(tmp_path: Path) -> None:
    """Next to a clone, a folder named titan_lite is there."""
    (tmp_path / "titan_lite").mkdir()
    (tmp_path / "json.py").write_text("raise SystemExit(7)")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        [ROOT / "run_train.sh", "--training.steps=x"],
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=GUARD,
        check=False,
    )
    assert result.returncode == 2, result.stderr
    assert "training.steps (command line): expected an integer" in result.stderr


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_opened_so_that_no_file_takes_their_place(closed: str) -> None:
    opened = "set_up_streams(); raise SystemExit(open('/dev/null').fileno() < 3)"
    for arguments in (
        f"-c 'from titan_lite.runtime.log import *; {opened}'".replace(
            "'/dev/null'", '"/dev/null"'
        ),
        "-m titan_lite.cli config",
        "-m titan_lite.launch --help",
    ):
        command = f"exec {sys.executable} {arguments} {closed}"
        assert subprocess.run(["bash", "-c", command], timeout=GUARD, check=False).returncode == 0


@pytest.mark.parametrize(("encoding", "letter"), [("ascii", rb"\xfc"), ("utf-8", b"\xc3\xbc")])
def test_characters_that_the_output_cannot_encode_are_escaped(encoding: str, letter: bytes) -> None:
    """A surrogate stands for a byte of a file name that is not UTF-8."""
    script = "import logging; from titan_lite.runtime.log import *; set_up_streams(); "
    script += r"set_up_logging(0); logging.getLogger('titan_lite').info('\xfc \udcff')"
    command = ("-m", "titan_lite.cli", "config", "--job.description=\xfc")
    for arguments, line in (
        (("-c", script), b" INFO " + letter + rb" \udcff"),
        (command, b'description = "' + letter + b'"'),
    ):
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        result = subprocess.run(
            [sys.executable, *arguments], env=environment, capture_output=True, check=False
        )
        assert (result.returncode, result.stderr) == (0, b"")
        assert line in result.stdout


def test_lines_of_the_log_that_nobody_reads_are_dropped() -> None:
    script = (
        "import logging; from titan_lite.runtime.log import set_up_logging; set_up_logging(0); "
        "logging.getLogger('titan_lite.x').info('a line')"
    )
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            [sys.executable, "-c", script],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert "Logging error" not in result.stderr
    assert "Traceback" not in result.stderr


def test_the_configuration_stands_anywhere_among_the_overrides() -> None:
    assert split_arguments(["My.TOML", "--a.b=c.toml"]) == ("My.TOML", ["--a.b=c.toml"])
    assert split_arguments(["--a.b=1", "a.toml"]) == ("a.toml", ["--a.b=1"])
    assert split_arguments(["--quiet", "a.toml"]) == ("a.toml", ["--quiet"])
    assert split_arguments(["--a.b=1"]) == (None, ["--a.b=1"])
    assert split_arguments(["--a.b=", "a.toml"]) == ("a.toml", ["--a.b="])


def test_the_configuration_of_a_launcher_is_an_argument_or_config_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DEVICE", "cpu")
    monkeypatch.setenv("CONFIG_FILE", "other.toml")
    assert Settings.read(["My.TOML"]).config == "My.TOML"
    assert Settings.read(["--a.b=1"]).config == "other.toml"
    monkeypatch.setenv("CONFIG_FILE", "other.yaml")
    for arguments, name in ([], "other.yaml"), (["my"], "my"):
        with pytest.raises(UsageError, match=rf"must be a \.toml file, got '{name}'"):
            Settings.read(arguments)


def test_a_configuration_that_is_not_there_or_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder.toml").mkdir()
    for name in ("missing.toml", "folder.toml"):
        result = launch(str(tmp_path / name))
        assert result.returncode == 2
        assert str(tmp_path / name) in result.stderr
        assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("variables", "endpoint"),
    [
        ({"RDZV_ENDPOINT": "node0:5"}, ("node0", 5)),
        ({"RDZV_ENDPOINT": "node0", "MASTER_ADDR": "node1"}, ("node0", 29500)),
        ({"RDZV_ENDPOINT": "[::1]:5"}, ("::1", 5)),
        ({"RDZV_ENDPOINT": "fe80::1"}, ("fe80::1", 29500)),
        ({"MASTER_ADDR": "10.0.0.1"}, ("10.0.0.1", 29500)),
        ({"MASTER_ADDR": "::1", "MASTER_PORT": "7"}, ("::1", 7)),
        ({"RDZV_ENDPOINT": "node0:http"}, "RDZV_ENDPOINT must be HOST:PORT, got 'node0:http'"),
        ({"RDZV_ENDPOINT": "fe80::1%eth0"}, ("fe80::1%eth0", 29500)),
        ({"RDZV_ENDPOINT": "tcp://n:5"}, "RDZV_ENDPOINT must be HOST:PORT, got 'tcp://n:5'"),
        ({"RDZV_ENDPOINT": "node0..net:5"}, "RDZV_ENDPOINT must be HOST:PORT, got 'node0..net:5'"),
        ({"MASTER_ADDR": ".net"}, "RDZV_ENDPOINT must be HOST:PORT, got '.net:29500'"),
        ({"RDZV_ENDPOINT": "node0:0"}, "RDZV_ENDPOINT must be HOST:PORT, got 'node0:0'"),
        ({}, "NNODES > 1 requires RDZV_ENDPOINT or MASTER_ADDR"),
    ],
)
def test_the_endpoint_is_read_from_the_variables(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], endpoint: tuple[str, int] | str
) -> None:
    for name in ("RDZV_ENDPOINT", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if isinstance(endpoint, tuple):
        assert read_endpoint() == endpoint
        return
    with pytest.raises(UsageError) as error:
        read_endpoint()
    assert str(error.value) == endpoint


def test_a_machine_without_an_address_of_version_4_reaches_itself_by_version_6(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bind = launcher.socket_at

    def without(*missing: str) -> Callable[[str], socket.socket]:
        def refuse(address: str) -> socket.socket:
            if address in missing:
                raise OSError("Cannot assign requested address")
            return bind("127.0.0.1")

        return refuse

    assert loopback() == "127.0.0.1"
    monkeypatch.setattr(launcher, "socket_at", without("127.0.0.1"))
    assert loopback() == "::1"
    monkeypatch.setattr(launcher, "socket_at", without("127.0.0.1", "::1"))
    with pytest.raises(UsageError, match="no loopback address"):
        loopback()


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "count_gpus", lambda: 2)
    monkeypatch.setenv("NGPU", "4")
    with pytest.raises(
        UsageError, match="NGPU must be at most 2, the GPUs that torch can use here, got 4"
    ):
        launcher.Settings.read(["my.toml"])


def test_gpus_that_torch_cannot_use_are_exit_code_2_unless_the_cpu_is_meant(
    slim: str, tmp_path: Path
) -> None:
    (tmp_path / "bin" / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: H100 (UUID: GPU-a)'\n")
    (tmp_path / "bin" / "nvidia-smi").chmod(0o755)
    # A build with CUDA returns the same without a driver as without a GPU.
    variables = {"PATH": slim, "CUDA_VISIBLE_DEVICES": "9"}
    result = launch(**variables)
    assert result.returncode == 2
    assert result.stderr.startswith("titan-lite: nvidia-smi lists GPUs (1), which torch cannot use")
    assert "set DEVICE=cpu" in result.stderr
    mistake = "--training.stpes=1"
    assert "unknown key" in launch(mistake, **variables, DEVICE="cpu").stderr
    assert "unknown key" in launch(mistake, **{**variables, "CUDA_VISIBLE_DEVICES": ""}).stderr


@pytest.mark.parametrize("script", ["run_train.sh", "run_tests.sh"])
def test_another_shell_is_told_to_use_bash(script: str) -> None:
    if (shell := shutil.which("dash")) is None:
        pytest.skip("dash, a shell that is not bash, is not installed")
    result = subprocess.run([shell, script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr == f"{script} needs bash: use bash {script}, or ./{script}\n"


@pytest.mark.parametrize("python", ["no-such-python", "false"])
def test_an_interpreter_that_is_none_is_refused(python: str) -> None:
    """Another one that has titan_lite is on the PATH."""
    result = launch(PYTHON=python)
    assert result.returncode == 2
    assert result.stderr == f"PYTHON={python} does not run Python 3.10 or newer\n"


def test_an_interpreter_that_was_chosen_is_not_replaced_by_another(tmp_path: Path) -> None:
    """It lacks titan_lite, which the one on the PATH has."""
    chosen = tmp_path / "my python"
    chosen.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    chosen.chmod(0o755)
    program = f"""
        source {ROOT}/scripts/environment.sh
        install_package() {{ "$(find_python)" -c 'import sys; print(sys.flags.no_site)'; }}
        VENV={tmp_path}/venv
        use_environment base
    """
    result = subprocess.run(
        ["bash", "-c", program],
        env={**os.environ, "PYTHON": str(chosen)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.stdout, result.stderr) == ("1\n", "")


@pytest.mark.parametrize(
    ("version", "chosen", "error"),
    [
        ("3.12.1 (main)", "my python", ""),
        ("3.12.1 (main)", "", ""),
        (
            "3.10.13 (main)",
            "my python",
            "PYTHON={chosen} is Python 3.12.1, but {venv} was made with Python 3.10.13: delete "
            "{venv}, and it is made again with PYTHON, or unset PYTHON to use it as it is\n",
        ),
        ("3.10.13 (main)", "", ""),
        (
            None,
            "",
            "{venv}/bin/python does not run Python 3.10 or newer: delete {venv}, and it is made "
            "again\n",
        ),
    ],
    ids=["the same", "none chosen", "another", "another, none chosen", "gone"],
)
def test_an_environment_of_another_interpreter_than_the_chosen_one_is_refused(
    tmp_path: Path, version: str | None, chosen: str, error: str
) -> None:
    """The environment is complete; neither interpreter has titan_lite."""
    venv, python = tmp_path / "venv", tmp_path / chosen

    def interpreter(path: Path, version: str | None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        answers = f'case "$2" in *sys.version\\)*) echo "{version}";; *importlib*) exit 1;; esac'
        path.write_text(f"#!/bin/sh\n{'exit 1' if version is None else answers}\n")
        path.chmod(0o755)

    interpreter(venv / "bin" / "python", version)
    if chosen:
        interpreter(python, "3.12.1 (main)")
    program = f"""
        set -e
        source {ROOT}/scripts/environment.sh
        is_installed() {{ true; }}
        VENV={venv}
        python3() {{ return 1; }}
        python() {{ return 1; }}
        use_environment base
        echo "$PYTHON"
    """
    result = subprocess.run(
        ["bash", "-c", program],
        env={**os.environ, "PYTHON": str(python) if chosen else ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stderr == error.format(chosen=python, venv=venv)
    assert result.returncode == (2 if error else 0)
    assert result.stdout == ("" if error else f"{venv}/bin/python\n")


def test_a_checkout_that_cannot_be_written_has_its_environment_elsewhere(
    tmp_path: Path,
) -> None:
    """The package is not installed for the interpreter; making the environment is recorded."""
    checkout, record = tmp_path / "checkout", tmp_path / "installed"
    shutil.copytree(ROOT / "scripts", checkout / "scripts")
    for name in ("run_train.sh", "pyproject.toml", "constraints.txt", "README.md"):
        shutil.copy(ROOT / name, checkout / name)
    (checkout / "titan_lite").mkdir()
    program = f"""
        source {checkout}/scripts/environment.sh
        install_package() {{ echo "$VENV" >{record}; mkdir "$VENV"; }}
        python3() {{ return 1; }}
        python() {{ return 1; }}
        use_environment base
        echo "$PYTHON $PYTHONPATH"
    """
    command = ["bash", "-c", program]
    if os.geteuid():
        checkout.chmod(0o555)
    else:
        # Root may write everywhere but on a file system that is read-only.
        mount = f"mount --bind {checkout} {checkout}; mount -o remount,ro,bind {checkout}; "
        command = unshared("--mount", "bash", "-c", mount + program)
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": ""}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    checkout.chmod(0o755)
    assert result.returncode == 0, result.stderr
    venv = record.read_text().strip()
    assert venv.startswith(f"{tmp_path}/cache/titan_lite/venv-")
    assert result.stdout == f"{venv}/bin/python {checkout}\n"


def unshared(*command: str) -> list[str]:
    """Runs a command in separate namespaces; skips the test if the system does not allow them."""
    mapped = [] if os.geteuid() == 0 else ["--map-root-user"]
    full = ["unshare", *mapped, *command]
    probe = ["unshare", *mapped, "--uts", "--mount", "--net", "true"]
    if shutil.which("unshare") is None or subprocess.run(probe, check=False).returncode:
        pytest.skip("unshare(1) is not there, or not permitted")
    return full


NOWHERE = """
import array, fcntl, os, socket, struct, subprocess, sys
# The loopback interface up, a name that nobody knows, a name server that does not answer.
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as configured:
    fcntl.ioctl(configured, 0x8914, struct.pack("16sh14x", b"lo", 0x1 | 0x40))
socket.sethostname("nowhere-at-all")
for name, text in (("resolv.conf", "nameserver 127.0.0.53"), ("hosts", "127.0.0.1 localhost")):
    open(name, "w").write(text + chr(10))
    subprocess.run(["mount", "--bind", name, f"/etc/{name}"], check=True)
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind(("127.0.0.53", 53))
server.setblocking(False)
code = subprocess.run(sys.argv[1:], cwd=os.environ["CHECKOUT"]).returncode
received = b""
try:
    while True:
        received += server.recv(4096)
except BlockingIOError:
    pass
sys.exit(99 if b"nowhere-at-all" in received else code)
"""


@pytest.mark.distributed
@pytest.mark.slow
def test_one_node_needs_no_name_for_itself(tmp_path: Path) -> None:
    """A lookup of the own name would wait for its timeout, again and again."""
    arguments = ["--training.steps=1", "--training.seq_len=64", f"--job.dump_folder={tmp_path}/run"]
    result = subprocess.run(
        unshared(
            *("--uts", "--mount", "--net", sys.executable, "-c", NOWHERE),
            *("./run_train.sh", *arguments),
        ),
        cwd=tmp_path,
        env={
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "CHECKOUT": str(ROOT),
        },
        capture_output=True,
        text=True,
        timeout=GUARD,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(read_metrics(tmp_path / "run")) == 1


STUB = """
import sys
from titan_lite import launch
launch.PROGRAM = (sys.executable, "-c", sys.argv[1])
launch._check = lambda settings: 0
launch._serve = lambda server: None
sys.exit(launch.main(["my.toml"]))
"""
# The first lines of every program that replaces training.
PRELUDE = """
import os, signal, sys, time
from pathlib import Path
rank, folder = int(os.environ["RANK"]), Path(os.environ["FOLDER"])
def wait_for(name):
    while not (folder / name).exists():
        time.sleep(0.05)
def end(code):
    sys.stdout.flush()
    os._exit(code)
from titan_lite.runtime.parent import watch_parent
watch_parent(lambda: end(1))
signal.signal(signal.SIGUSR1, lambda *_: end(75))
(folder / f"{rank} is there").write_text(str(os.getpid()))
"""
SLEEP = "time.sleep(999)"


class Launched:
    """The launcher, with another program instead of training."""

    def __init__(
        self, folder: Path, program: str, *, wrapper: Sequence[str] = (), **environment: str
    ) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [*wrapper, sys.executable, "-c", STUB, PRELUDE + program],
            env={**os.environ, "NGPU": "2", "DEVICE": "cpu", "FOLDER": str(folder), **environment},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait_for(self, *names: str) -> None:
        deadline = time.monotonic() + 240
        while not all((self.folder / name).exists() for name in names):
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < deadline, names
            time.sleep(0.02)

    def read_until(self, text: str) -> str:
        """Output up to a line with a text."""
        assert self.process.stdout is not None
        lines = ""
        for line in self.process.stdout:
            lines += line
            if text in line:
                return lines
        raise AssertionError(lines)

    def end(self) -> tuple[int, str]:
        """Exit code and what was printed."""
        output, _ = self.process.communicate(timeout=GUARD)
        return self.process.returncode, output

    def pids(self) -> list[int]:
        return [int((self.folder / f"{rank} is there").read_text()) for rank in (0, 1)]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Launched]]:
    started: list[Launched] = []

    def start(program: str, **options: Any) -> Launched:
        started.append(Launched(tmp_path, program, **options))
        return started[-1]

    yield start
    for launched in started:
        launched.process.kill()
        launched.process.wait()


@pytest.mark.parametrize(
    ("program", "code", "messages"),
    [
        ("end(0)", 0, ""),
        ("end(75)", 75, ""),
        ("end(143 if rank else 75)", 143, ""),
        # A rank's message must not be hidden by the failure that its end causes in the other.
        ("if rank: print('a mistake'); end(2)\nwait_for('1 is there'); end(1)", 2, "a mistake\n"),
        (f"if rank: end(3)\n{SLEEP}", 1, ""),
        (
            f"if rank: os.kill(os.getpid(), signal.SIGKILL)\n{SLEEP}",
            1,
            "titan-lite: rank 1, process {}, was killed by SIGKILL (possibly by the kernel's "
            "out-of-memory killer)\n",
        ),
        ("os.kill(os.getpid(), signal.SIGSEGV) if rank else 0", 1, "was killed by SIGSEGV"),
        (
            "os.kill(os.getpid(), signal.SIGBUS) if rank else 0",
            1,
            "was killed by SIGBUS (possibly because a data file was cut, or /dev/shm is full)",
        ),
    ],
)
def test_the_exit_code_is_that_of_the_process_that_knows(
    start: Callable[..., Launched], program: str, code: int, messages: str
) -> None:
    launched = start(program)
    ended, output = launched.end()
    assert ended == code, output
    # Rank 0 may have been ended before it wrote its id.
    assert messages.format((launched.folder / "1 is there").read_text()) in output
    assert output.count("\n") == (1 if messages else 0)


def test_a_failure_is_tried_again_from_the_start_as_often_as_asked_and_a_mistake_is_not(
    start: Callable[..., Launched],
) -> None:
    program = "code = 1 if (folder / 'tried').exists() else 7\n(folder / 'tried').touch()\n"
    launched = start(program + "end(code if rank else 0)", MAX_RESTARTS="2")
    assert launched.end() == (
        1,
        "titan-lite: Starting all processes again: restart 1 of 2\n"
        "titan-lite: Starting all processes again: restart 2 of 2\n",
    )
    assert start("end(2)", MAX_RESTARTS="2").end() == (2, "")
    assert start("end(75)", MAX_RESTARTS="2").end() == (75, "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_the_first_signal_asks_to_stop(
    start: Callable[..., Launched], number: signal.Signals
) -> None:
    launched = start(SLEEP)
    launched.wait_for("0 is there", "1 is there")
    launched.process.send_signal(number)
    hint = "; a second Ctrl-C ends at once" if number == signal.SIGINT else ""
    expected = f"titan-lite: {number.name}: stopping within three steps{hint}\n"
    assert launched.end() == (75, expected)


def test_a_second_ctrl_c_ends_at_once(start: Callable[..., Launched]) -> None:
    deaf = "signal.signal(signal.SIGUSR1, signal.SIG_IGN); (folder / f'{rank} deaf').touch()\n"
    launched = start(deaf + SLEEP)
    launched.wait_for("0 deaf", "1 deaf")
    launched.process.send_signal(signal.SIGINT)
    launched.read_until("SIGINT: stopping within three steps; a second Ctrl-C ends at once")
    launched.process.send_signal(signal.SIGINT)
    assert launched.end() == (130, "")
    for pid in launched.pids():
        wait_for_end(pid)


def test_further_signals_do_not_end_a_run_without_its_checkpoint(
    start: Callable[..., Launched],
) -> None:
    """GNU timeout sends its signal twice; a shell and systemd send SIGHUP later."""
    note = "(folder / f'{rank} was signalled').touch()"
    program = f"signal.signal(signal.SIGUSR1, lambda *_: ({note}, wait_for('go'), end(75)))\n"
    launched = start(program + f"(folder / f'{{rank}} waits').touch()\n{SLEEP}")
    launched.wait_for("0 waits", "1 waits")
    launched.process.send_signal(signal.SIGTERM)
    launched.wait_for("0 was signalled", "1 was signalled")
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT):
        launched.process.send_signal(number)
        # The launcher looks at each of them by itself.
        time.sleep(3 * POLL_SECONDS)
    (launched.folder / "go").touch()
    assert launched.end() == (75, "titan-lite: SIGTERM: stopping within three steps\n")


def test_a_process_that_is_asked_before_it_listens_does_not_leave_the_others_waiting(
    start: Callable[..., Launched],
) -> None:
    """One of them starts later; the other has noted the signal and waits for it."""
    program = "signal.signal(signal.SIGUSR1, signal.SIG_DFL if rank else signal.SIG_IGN)\n"
    launched = start(program + f"(folder / f'{{rank}} waits').touch()\n{SLEEP}")
    launched.wait_for("0 waits", "1 waits")
    launched.process.send_signal(signal.SIGTERM)
    code, output = launched.end()
    assert (code, output.count("\n")) == (143, 1), output
    for pid in launched.pids():
        wait_for_end(pid)


def test_nodes_that_are_asked_before_all_processes_listen_end_as_asked(
    start: Callable[..., Launched],
) -> None:
    """The process of the first node does not listen yet; that of the other node is not called."""
    variables = {"NGPU": "1", "NNODES": "2", "RDZV_ENDPOINT": f"localhost:{free_port()}"}
    program = "signal.signal(signal.SIGUSR1, signal.SIG_DFL)\n"
    # Ended by another signal, this process would be one that failed.
    program += "signal.signal(signal.SIGTERM, lambda *_: end(1))\n"
    program += f"(folder / f'{{rank}} waits').touch()\n{SLEEP}"
    nodes = [start(program, **variables)]
    nodes[0].read_until("Waiting")
    nodes.append(start(program, **variables))
    nodes[0].wait_for("0 waits", "1 waits")
    nodes[0].process.send_signal(signal.SIGTERM)
    assert [node.end()[0] for node in nodes] == [143, 143]


def test_a_hang_up_that_nohup_ignores_stays_ignored(
    start: Callable[..., Launched], tmp_path: Path
) -> None:
    program = "(folder / f'{rank} ignores').write_text(repr(signal.getsignal(signal.SIGHUP)))\n"
    launched = start(program + "wait_for('go')", wrapper=("nohup",))
    launched.wait_for("0 ignores", "1 ignores")
    assert "SIG_IGN" in (tmp_path / "0 ignores").read_text()
    launched.process.send_signal(signal.SIGHUP)
    (tmp_path / "go").touch()
    assert launched.end()[0] == 0


def test_processes_end_when_their_launcher_is_killed(start: Callable[..., Launched]) -> None:
    launched = start(SLEEP)
    launched.wait_for("0 is there", "1 is there")
    launched.process.kill()
    for pid in launched.pids():
        wait_for_end(pid)


def test_variables_are_set_where_the_user_has_not(start: Callable[..., Launched]) -> None:
    names = ("WORLD_SIZE", "LOCAL_RANK", "PYTORCH_ALLOC_CONF", "CUDA_VISIBLE_DEVICES")
    program = f"if rank: print(*[os.environ.get(name) for name in {names}])"
    assert start(program).end()[1] == "2 1 expandable_segments:True \n"
    assert start(program, PYTORCH_ALLOC_CONF="a:b").end()[1] == "2 1 a:b \n"
    assert start(program, PYTORCH_CUDA_ALLOC_CONF="a:b").end()[1] == "2 1 None \n"


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGTERM, 143),
        (signal.SIGUSR1, 143),
        (signal.SIGHUP, 143),
        (signal.SIGINT, 130),
    ],
)
def test_a_launcher_that_waits_for_nodes_says_so_and_ends_at_the_first_signal(
    start: Callable[..., Launched], number: signal.Signals, code: int
) -> None:
    port = free_port()
    launched = start(SLEEP, NNODES="2", RDZV_ENDPOINT=f"localhost:{port}")
    assert launched.read_until("Waiting for 1 of 2 nodes at localhost:") == (
        f"titan-lite: Waiting for 1 of 2 nodes at localhost:{port}\n"
    )
    launched.process.send_signal(number)
    assert launched.end() == (code, "")


def test_a_port_that_is_taken_is_exit_code_2(start: Callable[..., Launched]) -> None:
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        launched = start(SLEEP, NNODES="2", RDZV_ENDPOINT=f"localhost:{port}")
        connection, _ = server.accept()
        connection.sendall(b"HTTP/1.1 400 Bad Request\r\n")
        code, output = launched.end()
        connection.close()
    assert code == 2
    assert output == (
        f"titan-lite: localhost:{port} is in use by another program: set RDZV_ENDPOINT to a free "
        "port, the same on all nodes\n"
    )


def test_the_code_of_one_node_is_that_of_all_and_a_killed_one_can_be_replaced(
    start: Callable[..., Launched], tmp_path: Path
) -> None:
    endpoint = f"localhost:{free_port()}"
    variables = {"NGPU": "1", "NNODES": "2", "RDZV_ENDPOINT": endpoint, "MAX_RESTARTS": "1"}
    program = "again = (folder / 'again').exists(); (folder / f'{rank} runs').touch()\n"
    program += f"if again and rank: end(2)\n{SLEEP}"
    first = start(program, **variables)
    first.read_until("Waiting")
    second = start(program, **variables)
    first.wait_for("0 runs", "1 runs")
    (tmp_path / "again").touch()
    second.process.kill()
    seen = first.read_until("Waiting")
    third = start(program, **variables)
    assert third.end()[0] == 2
    code, output = first.end()
    assert (code, seen + output) == (
        2,
        "titan-lite: Lost the connection to node 1\n"
        "titan-lite: Exiting because another node failed; see its log for the cause\n"
        "titan-lite: Starting all processes again: restart 1 of 1\n"
        f"titan-lite: Waiting for 1 of 2 nodes at {endpoint}\n"
        "titan-lite: Exiting because another node failed; see its log for the cause\n",
    )


def test_a_system_without_a_temporary_folder_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(UsageError, match="No such file or directory; set TMPDIR to a folder that"):
        launcher._temporary_folder()


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return int(server.getsockname()[1])


def test_runs_of_a_comparison_are_started_by_the_launcher_and_end_with_their_parent(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[tuple[list[str], dict[str, str]]] = []

    def run(command: list[str], env: dict[str, str], **_: object) -> object:
        calls.append((command, env))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    run_training(Path("my.toml"), ["--a.b=1"], 2, tmp_path, on_cpu=True)
    (command, variables), *_ = calls
    assert command[:6] == [*PYTHON, "titan_lite.launch", "my.toml"]
    assert variables["TITAN_LITE_PARENT"] == str(os.getpid())
    assert (variables["NGPU"], variables["DEVICE"]) == ("2", "cpu")
