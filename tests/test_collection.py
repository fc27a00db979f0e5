"""The names of tests, which every process of `pytest -n` must make alike."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
# As of a process that starts a day later.
PROGRAM = """
import sys, time, pytest
seconds, nanoseconds = time.time, time.time_ns
time.time = lambda: seconds() + int(sys.argv[1])
time.time_ns = lambda: nanoseconds() + int(sys.argv[1]) * 10**9
sys.exit(pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", "tests"]))
"""


def collect(later: int, hash_seed: str, folder: Path) -> "subprocess.Popen[str]":
    """Starts to collect the suite with another clock, hash seed and folder of temporary files."""
    folder.mkdir()
    changed = {"PYTHONHASHSEED": hash_seed, "TMPDIR": str(folder), "PYTEST_ADDOPTS": ""}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(later)],
        cwd=ROOT,
        env=os.environ | changed,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_every_process_collects_the_same_names_in_the_same_order(tmp_path: Path) -> None:
    processes = [collect(0, "1", tmp_path / "now"), collect(86_400, "2", tmp_path / "later")]
    now, later = (
        [line for line in process.communicate()[0].splitlines() if "::" in line]
        for process in processes
    )
    assert len(now) > 1000
    assert [pair for pair in zip(now, later, strict=True) if pair[0] != pair[1]] == []
