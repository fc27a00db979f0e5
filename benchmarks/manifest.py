"""The machine, versions and commit of a benchmark, stored with every result."""

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from titan_lite import __version__
from titan_lite.metrics.device import device_name
from titan_lite.runtime.run_folder import git_commit

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
RESULTS = Path(__file__).parent / "results"


def store(benchmark: str, results: Any, output: str | None) -> str:
    """Returns a JSON object of the results and the machine, versions and commit behind them.

    It is also written to the file `output`, a relative one below benchmarks/results/.
    """
    manifest = {
        "command": shlex.join(["python", "-m", f"benchmarks.{benchmark}", *sys.argv[1:]]),
        "device": device_name(DEVICE),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "driver": driver_version(),
        "titan_lite": __version__,
        "git_commit": git_commit(),
    }
    content = {"benchmark": benchmark, "results": results, "manifest": manifest}
    text = json.dumps(content, indent=2)
    if output is not None:
        # Replaced in one step: a benchmark that is killed here keeps the earlier file.
        part = RESULTS / f"{output}.part"
        part.write_text(text + "\n")
        part.replace(RESULTS / output)
    return text


def driver_version() -> str | None:
    """Returns the version of NVIDIA's driver, None without one."""
    if not (program := shutil.which("nvidia-smi")):
        return None
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    lines = subprocess.run(query, capture_output=True, text=True, check=False).stdout.splitlines()
    return lines[0] if lines else None
