"""The names of tests, which every process of `pytest -n` must make alike."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# As of a process that starts a day later.
PROGRAM = """
import sys, time, pytest
seconds, nanoseconds = time.time, time.time_ns
time.time = lambda: seconds() + int(sys.argv[1])
time.time_ns = lambda: nanoseconds() + int(sys.argv[1]) * 10**9
sys.exit(pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", "tests"]))
"""


@pytest.mark.slow
def test_every_process_collects_the_same_names_in_the_same_order(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """This one, and another with another clock, hash seed and folder of temporary files."""
    changed = {"PYTHONHASHSEED": "1", "TMPDIR": str(tmp_path), "PYTEST_ADDOPTS": ""}
    other = subprocess.run(
        [sys.executable, "-c", PROGRAM, "86400"],
        cwd=ROOT,
        env=os.environ | changed,
        stdout=subprocess.PIPE,
        text=True,
    )
    names = [line for line in other.stdout.splitlines() if "::" in line]
    assert len(names) > 1000
    own = [item.nodeid for item in request.session.items]
    if len(own) < len(names):
        # Some of the tests, which tests/conftest.py orders by their own number.
        chosen = {*own}
        own, names = sorted(own), sorted(name for name in names if name in chosen)
    assert [pair for pair in zip(own, names, strict=True) if pair[0] != pair[1]] == []
