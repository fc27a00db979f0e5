"""Where and with what a benchmark ran; printed with every result."""

import json
import os
import platform
from typing import Any

import torch

from titan_lite import __version__
from titan_lite.metrics.device import device_name
from titan_lite.runtime.run_folder import git_commit

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def report(benchmark: str, results: Any) -> None:
    """Prints one JSON object: the results and the machine, versions and commit behind them."""
    manifest = {
        "device": device_name(DEVICE),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "titan_lite": __version__,
        "git_commit": git_commit(),
    }
    print(json.dumps({"benchmark": benchmark, "results": results, "manifest": manifest}, indent=2))
