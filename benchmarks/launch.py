"""Seconds from ./run_train.sh to the first logged step, and of `titan-lite config`.

    python -m benchmarks.launch [--rounds 3]

Both are compared with `import torch` alone. The environment exists already; the three are measured
in turn, medians are printed.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.manifest import report

ROOT = Path(__file__).parent.parent


def first_step_seconds() -> float:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        with subprocess.Popen(
            ["./run_train.sh", "--training.steps=1", f"--job.dump_folder={folder}"],
            cwd=ROOT,
            env={**os.environ, "PATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as process:
            assert process.stdout is not None
            seconds = next(
                time.perf_counter() - start
                for line in process.stdout
                if line.startswith("step") and "loss" in line
            )
            process.communicate()
    return seconds


def seconds(*arguments: str) -> float:
    """Of one run of Python."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    launches, imports, configs = [], [], []
    for _ in range(rounds):
        imports.append(seconds("-c", "import torch"))
        configs.append(seconds("-m", "titan_lite.cli", "config", "train_configs/debug.toml"))
        launches.append(first_step_seconds())
    report(
        "launch",
        {
            "first_step_seconds": round(statistics.median(launches), 2),
            "import_torch_seconds": round(statistics.median(imports), 2),
            "config_seconds": round(statistics.median(configs), 2),
            "first_step_over_import_torch": round(
                statistics.median(a / b for a, b in zip(launches, imports, strict=True)), 2
            ),
        },
    )
