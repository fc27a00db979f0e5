"""Time to the first logged step of ./run_train.sh, and of `titan-lite config`, over `import torch`.

    python -m benchmarks.launch [--rounds 3] [--vs CHECKOUT] [--output launch.json]

The environment must exist. The commands take turns; medians of the rounds are printed, as seconds
and as CPU time of all processes until they end, which depends less on other programs. With --vs,
another checkout of this repository takes turns as well.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.command import benchmark_parser, positive, run_benchmark
from benchmarks.measure import Values

ROOT = Path(__file__).parent.parent

Measured = tuple[float, float]
"""Seconds, and processor seconds of all processes."""


def measure(work: Callable[[], float]) -> Measured:
    """Calls a function that returns its seconds, and waits for the processes that it starts."""
    start = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = work()
    end = resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime


def launch(checkout: Path) -> Measured:
    """Returns the seconds to the debug model's first step, in processes of the launcher."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

    def run() -> float:
        start = time.perf_counter()
        with (
            tempfile.TemporaryDirectory() as folder,
            subprocess.Popen(
                ["./run_train.sh", "--training.steps=1", f"--job.dump_folder={folder}"],
                cwd=checkout,
                env={**os.environ, "PATH": path},
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            ) as process,
        ):
            assert process.stdout is not None
            seconds = next(
                time.perf_counter() - start
                for line in process.stdout
                if line.startswith("step") and "loss" in line
            )
            process.communicate()
        return seconds

    return measure(run)


def python(*arguments: str) -> Measured:
    """Returns the seconds of one run of Python."""

    def run() -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - start

    return measure(run)


def over(values: Sequence[Measured], imports: Sequence[Measured]) -> dict[str, float]:
    """Returns medians over the rounds, and of the ratios to `import torch` in the same round."""
    ratios = [
        (seconds / import_seconds, processor / import_processor)
        for (seconds, processor), (import_seconds, import_processor) in zip(
            values, imports, strict=True
        )
    ]
    columns = {
        "seconds": [seconds for seconds, _ in values],
        "processor_seconds": [processor for _, processor in values],
        "seconds_over_import_torch": [seconds for seconds, _ in ratios],
        "processor_seconds_over_import_torch": [processor for _, processor in ratios],
    }
    return {name: round(statistics.median(column), 2) for name, column in columns.items()}


def measured(options: argparse.Namespace) -> Values:
    """Lets the commands take turns."""
    checkouts = {"first_step": ROOT}
    if options.vs is not None:
        checkouts["first_step_vs"] = options.vs
    imports: list[Measured] = []
    values: dict[str, list[Measured]] = {name: [] for name in (*checkouts, "config")}
    for _ in range(options.rounds):
        imports.append(python("-c", "import torch"))
        values["config"].append(
            python("-m", "titan_lite.cli", "config", "train_configs/debug.toml")
        )
        for name, checkout in checkouts.items():
            values[name].append(launch(checkout))
    return {name: over(column, imports) for name, column in values.items()}


def main(argv: Sequence[str] | None = None) -> int:
    parser = benchmark_parser("launch", __doc__)
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--vs", type=Path, metavar="CHECKOUT")
    return run_benchmark(parser, argv, measured)


if __name__ == "__main__":
    sys.exit(main())
