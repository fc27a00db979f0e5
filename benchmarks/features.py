"""Short runs of a small model, each with a feature that may fail on a new device.

    python -m benchmarks.features [--only NAME ...] [--each 90] [--limit 200] [--output FILE]
        [--section.key=value ...]

A run has `each` seconds, and none starts later than `limit` seconds after the first. The file is
written after each run. Exits with 1 if a run failed or was not started.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.command import benchmark_parser, positive, run_benchmark
from benchmarks.measure import Values

DEBUG, BERT = "train_configs/debug.toml", "train_configs/debug_bert.toml"
COMPILE = "--compile.enable=true"
BFLOAT16 = "--training.param_dtype=bfloat16"
# float8 requires dimensions that are multiples of 16.
FLOAT8 = (COMPILE, "--model.dim=512", "--model.ffn_dim=1536")
SAVES = ("--checkpoint.enable=true", "--checkpoint.interval=10")

FEATURES: dict[str, tuple[str, ...]] = {
    "plain": (DEBUG,),
    "compile": (DEBUG, COMPILE),
    "documents": (DEBUG, "--data.packing=document"),
    "documents, compile": (DEBUG, "--data.packing=document", COMPILE),
    "float8 tensorwise": (DEBUG, *FLOAT8, "--float8.recipe=tensorwise"),
    "float8 rowwise": (DEBUG, *FLOAT8, "--float8.recipe=rowwise"),
    "cudnn": (DEBUG, BFLOAT16, "--attention.kernel=cudnn"),
    "flash2": (DEBUG, BFLOAT16, "--attention.kernel=flash2"),
    "math": (DEBUG, "--attention.kernel=math"),
    "async_pinned": (DEBUG, *SAVES, "--checkpoint.async_mode=async_pinned"),
    "cpu_offload": (DEBUG, "--parallel.cpu_offload=true"),
    "selective_op, compile": (DEBUG, COMPILE, "--activation_checkpoint.mode=selective_op"),
    "float16": (DEBUG, "--training.param_dtype=float16"),
    "BERT": (BERT,),
}


def run(name: str, each: int, overrides: Sequence[str]) -> Values:
    """Returns the first and last loss of the run, or the end of its log."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        own = ("--training.steps=30", "--metrics.log_freq=1", f"--job.dump_folder={folder}")
        command = [sys.executable, "-m", "titan_lite.launch", *FEATURES[name], *own, *overrides]
        with (Path(folder) / "log").open("w+") as log:
            try:
                code: int | None = subprocess.run(
                    command,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    timeout=each,
                    env={**os.environ, "NGPU": "1"},
                ).returncode
            except subprocess.TimeoutExpired:
                code = None
            seconds = round(time.monotonic() - begin, 1)
            if code != 0:
                log.seek(0)
                reason = f"no end after {each} s" if code is None else f"exit code {code}"
                lines = log.read().splitlines()[-40:]
                return {"feature": name, "seconds": seconds, "failed": reason, "log": lines}
        records = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    first, last = (json.loads(records[at])["loss"] for at in (0, -1))
    return {"feature": name, "seconds": seconds, "first_loss": first, "last_loss": last}


def measured(options: argparse.Namespace) -> Iterator[Values]:
    """Yields the result of each run."""
    begin = time.monotonic()
    for name in options.only:
        if time.monotonic() - begin > options.limit:
            yield {"feature": name, "failed": "no time was left"}
        else:
            yield run(name, options.each, options.overrides)


def report(_options: argparse.Namespace, results: Sequence[Values], text: str) -> int:
    """Prints the results; returns 1 if a run failed."""
    print(text)
    return int(any("failed" in result for result in results))


def main(argv: Sequence[str] | None = None) -> int:
    parser = benchmark_parser("features", __doc__)
    parser.add_argument("--only", nargs="+", default=list(FEATURES), choices=FEATURES)
    parser.add_argument("--each", type=positive, default=90, help="in seconds")
    parser.add_argument("--limit", type=positive, default=200, help="in seconds")
    return run_benchmark(parser, argv, measured, takes_overrides=True, report=report)


if __name__ == "__main__":
    sys.exit(main())
