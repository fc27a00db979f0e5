"""Failures that a run survives, and those that end it: real processes, signals and files."""

import contextlib
import errno
import fcntl
import json
import multiprocessing
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from socket import gethostname
from typing import Any
from unittest import mock

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.distributed import GUARD, PRELOADED, Workers
from tests.metrics.test_sinks import destination
from tests.runs import TINY, build_trainer, full_disk, read_metrics, train
from tests.runtime.test_parent import wait_for_end
from tests.test_launcher import launch
from titan_lite.checkpoint.state import retire_later_steps, saved_steps
from titan_lite.config.load import ConfigError
from titan_lite.metrics.sinks import Destination, JsonlSink
from titan_lite.metrics.tensorboard_sink import TensorBoardSink
from titan_lite.runtime import folder_lock
from titan_lite.runtime.folder_lock import FolderLock
from titan_lite.runtime.run_folder import open_run_folder, write_run_file
from titan_lite.runtime.stop import EXIT_STOPPED
from titan_lite.runtime.writing import WriteError
from titan_lite.train import main
from titan_lite.training.trainer import logger

ROOT = Path(__file__).parent.parent
STEPS = 40
SETTINGS = (
    *TINY,
    "--training.local_batch_size=4",
    f"--training.steps={STEPS}",
    "--checkpoint.enable=true",
    "--checkpoint.interval=5",
    "--metrics.enable_tensorboard=true",
)
SECRETS = {"HF_TOKEN": "hf_not_to_be_seen", "WANDB_API_KEY": "0123456789abcdef_not_to_be_seen"}
NUMERIC = ("step", "loss", "grad_norm", "lr", "tokens")


LAUNCHER = ("./run_train.sh",)
# The same processes as from run_train.sh, without the seconds of its check of the configuration.
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
TORCHRUN += ("-m", "titan_lite.train", "train_configs/debug.toml")


class Launch:
    """Two processes, whose output goes to a file."""

    def __init__(
        self, launcher: Sequence[str], folder: Path, *overrides: str, **environment: str
    ) -> None:
        self.folder, self.log = folder, folder.with_suffix(".log")
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        variables = {"PATH": path, "NGPU": "2", "CUDA_VISIBLE_DEVICES": ""}
        variables["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")  # as workers have
        with self.log.open("a") as output:
            self.process = subprocess.Popen(
                [*launcher, *SETTINGS, f"--job.dump_folder={folder}", *overrides],
                cwd=ROOT,
                env={**os.environ, **variables, **environment},
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def __enter__(self) -> "Launch":
        return self

    def __exit__(self, *_: object) -> None:
        """Leaves no process behind: torchrun starts each in a separate session."""
        for process in self._processes():
            os.kill(int(process.name), signal.SIGKILL)
        self.process.wait()

    def wait(self) -> int:
        return self.process.wait(GUARD)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + GUARD
        while not condition():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.005)

    def wait_for_step(self, step: int) -> None:
        metrics = self.folder / "metrics.jsonl"
        self.wait_until(lambda: metrics.exists() and f'"step": {step},' in metrics.read_text())

    def pid(self, rank: int) -> int:
        of_rank = [
            int(process.name)
            for process in self._processes()
            if f"RANK={rank}".encode() in (process / "environ").read_bytes().split(b"\0")
        ]
        # The first: what a process forks looks like itself for a moment.
        return min(of_rank)

    def _processes(self) -> list[Path]:
        """Those of this run that are there, in /proc."""
        argument = f"--job.dump_folder={self.folder}".encode()
        actual = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if argument in (process / "cmdline").read_bytes().split(b"\0"):
                    actual.append(process)
        return actual


def numbers(records: list[dict[str, Any]]) -> list[list[float]]:
    return [[record[key] for key in NUMERIC] for record in records]


@pytest.mark.distributed
@pytest.mark.slow
def test_killed_restarted_stopped_and_resumed_a_run_is_the_undisturbed_one_bit_for_bit(
    workers: dict[int, Workers], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = workers[2].run(train, tmp_path / "undisturbed", *SETTINGS)[0]
    monkeypatch.setattr(folder_lock, "LOCK_SECONDS", 0.0)
    folder = tmp_path / "run"
    with Launch(LAUNCHER, folder, MAX_RESTARTS="1", **SECRETS) as run:
        run.wait_for_step(7)
        message = rf"{folder} is in use by another run \(process {run.pid(0)} on .*; stop it"
        with pytest.raises(ValueError, match=message):
            FolderLock(folder)
        os.kill(run.pid(1), signal.SIGKILL)
        run.wait_until(lambda: "Resumed from" in run.log.read_text())
        run.wait_for_step(18)
        os.kill(run.process.pid, signal.SIGTERM)
        assert run.wait() == EXIT_STOPPED, run.log.read_text()
    stopped_at = saved_steps(folder / "checkpoint")[-1]
    assert 18 <= stopped_at < STEPS
    stopped = f"Stopped after step {stopped_at} (SIGTERM to the launcher): a checkpoint was saved"
    assert run.log.read_text().count(stopped) == 1
    assert "rank 1, process" in run.log.read_text()
    written = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    for secret in SECRETS.values():
        assert not any(secret.encode() in content for content in [*written, run.log.read_bytes()])

    records = workers[2].run(train, folder, *SETTINGS)[0]
    assert numbers(records) == numbers(expected)
    assert read_curve(folder) == list(range(1, STEPS + 1))


@pytest.mark.distributed
def test_two_runs_in_one_folder_are_refused_and_a_killed_one_leaves_no_lock(
    tmp_path: Path,
) -> None:
    """The first is a process that does nothing but hold the lock, as a run does."""
    program = (
        "import sys, time; from pathlib import Path;"
        "from titan_lite.runtime.folder_lock import FolderLock;"
        "lock = FolderLock(Path(sys.argv[1])); print(flush=True); time.sleep(99)"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        second = launch("--training.steps=1", f"--job.dump_folder={tmp_path}")
        assert second.returncode == 2
        expected = f"{tmp_path} is in use by another run (process {holder.pid} on {gethostname()})"
        assert expected in second.stderr
        holder.kill()
    FolderLock(tmp_path).release()


def test_a_folder_of_checkpoints_that_another_run_has_or_nobody_can_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_lock, "LOCK_SECONDS", 0.0)
    shared = tmp_path / "shared"
    lock = FolderLock(shared, "checkpoint.folder")
    settings = ("--checkpoint.enable=true", f"--checkpoint.folder={shared}")
    with pytest.raises(
        ConfigError, match=rf"{shared} is in use by another run .* set another check"
    ):
        build_trainer(tmp_path / "second", *settings)
    lock.release()
    (tmp_path / "file").touch()
    nowhere = f"--checkpoint.folder={tmp_path}/file/below"
    with pytest.raises(
        ConfigError, match=r"checkpoint\.folder .* cannot be created: .*file\" is a f"
    ):
        build_trainer(tmp_path / "second", settings[0], nowhere)
    # The refused run has released its lock, and a run does not lock itself out.
    FolderLock(tmp_path / "second").release()
    for folder in (tmp_path / "own", tmp_path / "own" / "checkpoint"):
        own = (f"--checkpoint.folder={folder}", "--checkpoint.enable=true")
        with pytest.raises(ConfigError, match="tokenizer"):
            build_trainer(tmp_path / "own", *own, "--data.tokenizer_path=none")


def test_a_file_system_without_locks_is_warned_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    FolderLock(tmp_path).release()
    assert "is on a file system without locks (No locks available)" in caplog.text


@pytest.mark.distributed
@pytest.mark.slow
def test_a_document_that_one_rank_cannot_read_ends_the_job_at_once_with_file_and_line(
    tmp_path: Path,
) -> None:
    lines = [json.dumps({"text": f"document {number} " * 100}) for number in range(200)]
    lines[30] = '{"text": broken'
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(lines))
    settings = (f"--data.dataset_path={data}", "--data.num_streams=2", "--data.shuffle_buffer=8")
    # By a timeout it would end later than the test.
    never = f"--comm.train_timeout_seconds={10 * GUARD}"
    with Launch(LAUNCHER, tmp_path / "run", *settings, never) as run:
        assert run.wait() == 1
    log = run.log.read_text()
    # Line 31 is the first stream's. The other process waits for the first one, and has
    # nothing to add.
    assert f"[rank0] ERROR data.dataset_path: {data}, line 31: not JSON" in log
    assert log.count(" ERROR ") == 1
    assert "Traceback" not in log
    assert "[rank1]" not in log


@pytest.mark.distributed
@pytest.mark.parametrize(("launcher", "code"), [(LAUNCHER, 2), (TORCHRUN, 1)])
def test_a_mistake_that_processes_find_is_printed_once(
    tmp_path: Path, launcher: Sequence[str], code: int
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "a document"}\nbroken')
    settings = (f"--data.dataset_path={data}", "--data.num_streams=2")
    with Launch(launcher, tmp_path / "run", *settings) as run:
        assert run.wait() == code
    log = run.log.read_text()
    assert log.count("titan-lite: 1 problem in the configuration") == 1
    assert log.count(f"{data}, line 2: not JSON") == 1
    if launcher == LAUNCHER:
        assert "Traceback" not in log


@pytest.mark.distributed
def test_processes_whose_launcher_was_killed_end_with_a_checkpoint(tmp_path: Path) -> None:
    with Launch(LAUNCHER, tmp_path / "run", "--training.steps=9999") as run:
        run.wait_for_step(2)
        pids = [run.pid(rank) for rank in (0, 1)]
        run.process.kill()
        for pid in pids:
            wait_for_end(pid)
    stopped_at = saved_steps(run.folder / "checkpoint")[-1]
    expected = f"Stopped after step {stopped_at} (its launcher has ended): a checkpoint was saved"
    assert run.log.read_text().count(expected) == 1


@pytest.mark.distributed
@pytest.mark.slow
def test_closing_the_terminal_ends_a_run_with_a_checkpoint(tmp_path: Path) -> None:
    """Nothing can be written to what is gone."""
    terminal, end = pty.openpty()
    command = (*LAUNCHER, *SETTINGS, "--training.steps=9999", f"--job.dump_folder={tmp_path}")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with subprocess.Popen(
        ["setsid", "--ctty", "--wait", *command],
        cwd=ROOT,
        env={**os.environ, "PATH": path, "NGPU": "1", "DEVICE": "cpu", "OMP_NUM_THREADS": "1"},
        stdin=end,
        stdout=end,
        stderr=end,
    ) as run:
        os.close(end)
        shown = b""
        while b" 2/9999" not in shown:
            shown += os.read(terminal, 4096)
        os.close(terminal)
        assert run.wait(240) == EXIT_STOPPED
    assert saved_steps(tmp_path / "checkpoint")


@pytest.mark.distributed
def test_documents_left_out_are_counted_in_the_metrics_once_whichever_rank_reads_them(
    workers: dict[int, Workers], tmp_path: Path
) -> None:
    lines = [json.dumps({"text": f"document {number} " * 30}) for number in range(60)]
    lines[::10] = ["broken"] * 6
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    settings = (f"--data.dataset_path={tmp_path / 'data.jsonl'}", "--data.on_bad_document=skip")
    # One stream, which both ranks read.
    streams = ("--data.num_streams=1", "--data.shuffle_buffer=5", "--training.local_batch_size=4")
    records = workers[2].run(train, tmp_path, "--training.steps=9", *settings, *streams)[0]
    counts = [record["skipped_documents"] for record in records]
    assert counts == sorted(counts)
    # 9 x 8 x 64 tokens are some 50 documents of 100.
    assert 3 <= counts[-1] <= 6


@pytest.mark.parametrize(
    ("write", "path"),
    [
        (lambda file: JsonlSink(destination(file)), "file/metrics.jsonl"),
        (lambda file: TensorBoardSink(destination(file)), "file/tb"),
        (lambda file: open_run_folder(file, resume_step=0), "file"),
        (lambda file: write_run_file(file, {}), "file/run.json"),
        (lambda file: retire_later_steps(file.parent, 2), "file/retired"),
    ],
)
def test_what_cannot_be_written_is_named_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], object], path: str
) -> None:
    monkeypatch.setattr(time, "strftime", lambda *_: "file/retired")
    (tmp_path / "step-3").mkdir()
    (tmp_path / "file").touch()
    reason = "Not a directory|File exists"
    with pytest.raises(WriteError, match=rf"^{tmp_path}/{path} cannot be written: ({reason})$"):
        write(tmp_path / "file")


@pytest.mark.parametrize(("sink", "path"), [(JsonlSink, "metrics.jsonl"), (TensorBoardSink, "tb")])
def test_metrics_stop_at_a_full_disk_with_all_records_before(
    tmp_path: Path, sink: Callable[[Destination], JsonlSink | TensorBoardSink], path: str
) -> None:
    opened, written = sink(destination(tmp_path)), []

    def write() -> None:
        for step in range(100):
            opened.write({"step": step, "loss": 0.5})
            written.append(step)

    with full_disk(600):
        message = rf"^{tmp_path}/{path} cannot be written: File too large$"
        with pytest.raises(WriteError, match=message):
            write()
        opened.close()
    assert len(written) > 5
    # The record that was cut short is dropped when the run resumes.
    sink(destination(tmp_path, start_step=99)).close()
    if sink is JsonlSink:
        assert read_metrics(tmp_path) == [{"step": step, "loss": 0.5} for step in written]
    else:
        assert read_curve(tmp_path) == written


def read_curve(folder: Path) -> list[int]:
    """The steps whose loss TensorBoard shows."""
    events = EventAccumulator(str(folder / "tb"))
    events.Reload()
    return [event.step for event in events.Scalars("train/loss")]


def test_a_lock_on_a_full_disk_is_refused_with_its_path(tmp_path: Path) -> None:
    with full_disk(0), pytest.raises(ConfigError, match=rf"File too large: '{tmp_path}/lock'"):
        build_trainer(tmp_path)


def _main(size: int, output: Connection, arguments: list[str]) -> None:
    """A process that trains, alone, on a disk for files of that size."""
    for descriptor in (1, 2):
        os.dup2(output.fileno(), descriptor)
    # git, which is called for the commit in run.json, would leave a half-written index.lock behind.
    os.environ["PATH"] = ""
    with full_disk(size):
        sys.exit(main(arguments))


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("size", "message"),
    [
        (2_000, "/run.json cannot be written: File too large"),
        (100_000, r"step 1 was not saved to .*/checkpoint: rank 0: \[Errno 27\] File too large: "),
    ],
)
def test_a_full_disk_ends_a_run_with_one_sentence_before_and_after_its_first_step(
    tmp_path: Path, size: int, message: str
) -> None:
    settings = [*SETTINGS, "--training.steps=1", f"--job.dump_folder={tmp_path}"]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    local, peer = context.Pipe(duplex=False)
    arguments = (size, peer, ["train_configs/debug.toml", *settings])
    process = context.Process(target=_main, args=arguments)
    process.start()
    peer.close()
    with open(local.fileno(), closefd=False) as written:
        output = written.read()
    process.join()
    assert process.exitcode == 1, output
    assert output.count(" ERROR ") == 1
    assert re.search(message, output.splitlines()[-1])
    assert "Traceback" not in output


@pytest.mark.distributed
@pytest.mark.slow
def test_a_rank_that_hangs_is_named_with_its_phase_and_ends_the_job_by_the_timeout(
    tmp_path: Path,
) -> None:
    # Saving has a longer timeout.
    settings = ("--comm.train_timeout_seconds=30", "--checkpoint.enable=false")
    with Launch(TORCHRUN, tmp_path / "run", *settings, "--training.steps=999") as run:
        run.wait_for_step(50)
        os.kill(hung := run.pid(1), signal.SIGSTOP)
        run.wait_until(lambda: "Failed in step" in run.log.read_text())
        run.wait_until(lambda: run.log.read_text().count("rank 1: ") == 2)
        # For torchrun's SIGTERM to end it, instead of SIGKILL half a minute later.
        os.kill(hung, signal.SIGCONT)
        assert run.wait() == 1
    log = run.log.read_text()
    assert re.search(r"WARNING No progress for \d+ s. The ranks, those furthest behind first:", log)
    assert re.search(r"Timed out waiting 30000ms", log)
    first, second = log.split("The ranks, those furthest behind first:\n")[2].splitlines()[:2]
    phases = "data|forward|backward|optimizer|log|save"
    assert re.match(rf"  rank 1: ({phases}) of step \d+ for .* silent for \d+ s", first)
    assert re.match(
        rf"  rank 0: ({phases}) of step \d+ for \d+ s, in \w+, from titan_lite/", second
    )


# One process, without a launcher.
ALONE = (sys.executable, "-m", "titan_lite.cli", "train", "train_configs/debug.toml")


@pytest.mark.distributed
def test_ctrl_c_stops_a_process_without_a_launcher_after_its_step(tmp_path: Path) -> None:
    with Launch(ALONE, tmp_path / "run", "--training.steps=999") as run:
        run.wait_for_step(2)
        run.process.send_signal(signal.SIGINT)
        assert run.wait() == EXIT_STOPPED, run.log.read_text()
    log = run.log.read_text()
    stopped_at = saved_steps(run.folder / "checkpoint")[-1]
    assert f"Stopped after step {stopped_at} (SIGINT): a checkpoint was saved" in log
    assert re.search(r"[\d,]+ parameters. Processes: 1, on .+. Applied features:\n  mesh ", log)
    assert log.count("Stopping within three steps; Ctrl-C again ends at once") == 1
    assert "Traceback" not in log


def _asked_on_one_rank(folder: Path, *overrides: str) -> tuple[int, bool, list[str]]:
    """Sends rank 1 a stop signal during step 3; returns where this rank stopped, and warnings."""
    trainer = build_trainer(folder, "--training.local_batch_size=4", *overrides)

    def ask(*_: object) -> None:
        if trainer.process.rank == 1 and trainer.state.step + 1 == 3:
            trainer.stop.signal = "SIGUSR1"

    trainer.built.train_step.optimizer.register_step_post_hook(ask)
    with mock.patch.object(logger, "warning") as warning:
        trainer.train()
    trainer.close()
    warnings = [call.args[0] % call.args[1:] for call in warning.call_args_list]
    return trainer.state.step, trainer.is_stopping, warnings


@pytest.mark.distributed
@pytest.mark.parametrize("axis", ["dp_shard", "tp", "pp"])
def test_a_signal_that_one_rank_gets_stops_all_after_the_same_step(
    workers: dict[int, Workers], tmp_path: Path, axis: str
) -> None:
    settings = (f"--parallel.{axis}=2", "--checkpoint.enable=true", "--training.steps=8")
    messages = ["Stopped after step 4 (SIGUSR1): a checkpoint was saved"]
    results = workers[2].run(_asked_on_one_rank, tmp_path, *settings)
    assert results == [(4, True, messages), (4, True, [])]
    assert saved_steps(tmp_path / "checkpoint") == [4]


@pytest.mark.parametrize(("code", "requeued"), [(75, True), (0, False), (1, False)])
def test_the_slurm_script_asks_for_the_signal_and_requeues_what_it_stopped(
    tmp_path: Path, code: int, requeued: bool
) -> None:
    script = ROOT / "scripts" / "multinode_trainer.slurm"
    assert "#SBATCH --signal=USR1@" in script.read_text()
    programs = {
        "srun": 'shift; exec "$@"',
        "scontrol": 'echo "$@" >>scontrol.log; echo node0; sleep 0.2; echo node1',
        "run_train.sh": f'test "$RDZV_ENDPOINT" = node0:29500 && exit {code}',
    }
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    variables = {
        "SLURM_JOB_NODELIST": "node[0-1]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_ID": "42",
    }
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        ["bash", str(script)],
        cwd=tmp_path,
        env={**os.environ, **variables, "PATH": path},
        check=False,
    )
    assert result.returncode == code
    assert ("requeue 42" in (tmp_path / "scontrol.log").read_text()) == requeued
