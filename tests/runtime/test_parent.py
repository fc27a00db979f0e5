"""All kinds of processes end once their parent was killed."""

import errno
import os
import signal
import subprocess
import sys
import time
from multiprocessing import synchronize
from pathlib import Path

import pytest

from titan_lite import cli

ROOT = Path(__file__).parent.parent.parent

# Each prints the id of a process that must not outlive this one, and waits.
POOL = """
import os, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from titan_lite.runtime.parent import end_with_parent
if __name__ == "__main__":
    pool = ProcessPoolExecutor(1, get_context("spawn"), initializer=end_with_parent)
    print(pool.submit(os.getpid).result(), flush=True)
    pool.submit(time.sleep, 999)
    time.sleep(999)
"""
CHILD = """
import os, subprocess, sys, time
from titan_lite.runtime.parent import PARENT
program = "import os, time; from titan_lite.runtime.parent import watch_parent; "
program += "watch_parent(lambda: os._exit(1)); print(os.getpid(), flush=True); time.sleep(999)"
variables = os.environ | ({PARENT: str(os.getpid())} if sys.argv[1:] else {})
subprocess.Popen([sys.executable, "-c", program], env=variables, start_new_session=True)
time.sleep(999)
"""


@pytest.mark.parametrize(("program", "arguments"), [(POOL, []), (CHILD, ["named"]), (CHILD, [])])
def test_a_process_whose_parent_was_killed_ends(
    tmp_path: Path, program: str, arguments: list[str]
) -> None:
    (tmp_path / "program.py").write_text(program)
    command = [sys.executable, str(tmp_path / "program.py"), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert is_alive(child)
        parent.send_signal(signal.SIGKILL)
    wait_for_end(child)


def wait_for_end(pid: int) -> None:
    """Fails, and ends the process, if that takes more than four minutes."""
    deadline = time.monotonic() + 240
    while is_alive(pid):
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            pytest.fail(f"process {pid} is still there")
        time.sleep(0.1)


@pytest.mark.parametrize(
    "command", [["dryrun", "--rank=0"], ["tokenize", "--output=tokens", "--processes=2"]]
)
def test_a_system_without_room_for_locks_of_processes_is_named(
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(synchronize.SemLock, "__init__", fail)
    monkeypatch.chdir(tmp_path)
    assert cli.main(command) == 2
    assert (
        "titan-lite: locks that processes share cannot be created: No space left on device; "
        "/dev/shm must be writable and have free space"
    ) in capsys.readouterr().err


def is_alive(pid: int) -> bool:
    try:
        # A process that nobody has waited for yet is a zombie, which does nothing.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
