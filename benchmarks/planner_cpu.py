"""Calibrates the planner on this machine, then compares its predictions with runs.

    python -m benchmarks.planner_cpu [--seconds 120] [--cluster FILE] [--only WORD ...]
        [--warmup 2] [--rounds 4] [--steps 2] [--output planner_cpu.json]

Under ten minutes on two quiet cores; nothing else may run. `--seconds` are those of
`titan-lite plan calibrate`, which `--cluster` replaces by a file that it wrote. The runs have two
processes each, and those of one group take turns. Printed: predicted and measured seconds of each
step, the errors, and pairs that differ by more than 15 % but are predicted in the wrong order.
"""

import argparse
import itertools
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.command import add_turns, benchmark_parser, run_benchmark
from benchmarks.measure import Values, Variant, measure
from benchmarks.workers import Group
from titan_lite.models.plan import make_plan
from titan_lite.planner.cluster import Cluster, find_cluster
from titan_lite.planner.predict import predict
from titan_lite.planner.read import read_job
from titan_lite.runtime.distributed import Process, start_process_group

PROCESSES = 2
DEBUG, BERT = "train_configs/debug.toml", "train_configs/debug_bert.toml"
# Pairs that are closer are not ranked.
RANKED = 0.15
# The runs of a group take turns.
GROUPS = (
    {
        "debug": (DEBUG, ()),
        "wide": (DEBUG, ("--model.dim=512", "--model.ffn_dim=1408")),
        "deep": (DEBUG, ("--model.num_layers=12",)),
        "long": (DEBUG, ("--training.seq_len=1024", "--training.local_batch_size=2")),
    },
    {
        "short": (DEBUG, ("--training.seq_len=128", "--training.local_batch_size=8")),
        "gpt_neox": (DEBUG, ("--model.name=gpt_neox",)),
        "qwen3": (DEBUG, ("--model.name=qwen3",)),
        "bert": (BERT, ()),
    },
    {
        "tp": (DEBUG, ("--parallel.tp=2",)),
        "pp": (DEBUG, ("--parallel.pp=2", "--training.global_batch_size=32")),
        "full": (DEBUG, ("--activation_checkpoint.mode=full",)),
        "selective_op": (DEBUG, ("--activation_checkpoint.mode=selective_op",)),
    },
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = benchmark_parser("planner_cpu", __doc__)
    parser.add_argument("--seconds", type=float, default=120.0, help="of the calibration")
    parser.add_argument("--cluster", help="a file of an earlier calibration")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="runs with the words")
    add_turns(parser, warmup=2, rounds=4, steps=2)
    return run_benchmark(parser, argv, measured)


def measured(options: argparse.Namespace) -> Values:
    """Calibrates, measures and compares."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(options.cluster or f"{folder}/this-machine.toml")
        if not options.cluster:
            file.write_text(calibrated(options.seconds), encoding="utf-8")
        cluster, text = find_cluster(str(file)), file.read_text(encoding="utf-8")
    runs = []
    for group in GROUPS:
        variants = [
            Variant(name, config, overrides, PROCESSES)
            for name, (config, overrides) in group.items()
            if not options.only or any(word in name for word in options.only)
        ]
        if variants:
            results = measure(variants, options)
            runs += [compared(*pair, cluster) for pair in zip(variants, results, strict=True)]
    return summary(runs) | {"cluster": text}


def calibrated(seconds: float) -> str:
    """Returns the file that titan-lite plan calibrate writes."""
    with Group(PROCESSES) as group:
        text: str = group.call(calibrate_here, seconds)[0]
    return text


def calibrate_here(seconds: float) -> str:
    """Calibrates in each process of a group."""
    from titan_lite.config.schema import Comm
    from titan_lite.tools.calibrate import calibrate, to_toml

    process = Process.from_environment()
    start_process_group(process, Comm())
    cluster, _, _ = calibrate(process, process.world_size, seconds)
    return to_toml(cluster, "benchmarks.planner_cpu", 0.0)


def compared(variant: Variant, measured: Values, cluster: Cluster) -> Values:
    """Returns the predicted and the measured step of a run."""
    plan = make_plan(variant.config, variant.overrides, variant.nproc)
    prediction = predict(read_job(plan), cluster, tokens=1.0)
    seconds = measured["seconds_per_step"]["median"]
    return {
        "run": variant.name,
        "measured": measured["seconds_per_step"],
        "predicted": prediction.step.seconds,
        "error": prediction.step.seconds / seconds - 1,
        "in_interval": prediction.interval.low <= seconds <= prediction.interval.high,
        "parts": prediction.step.parts,
    }


def summary(runs: Sequence[Values]) -> Values:
    """Returns errors over the runs, and the pairs in the wrong order."""
    sizes = [abs(run["error"]) for run in runs]
    wrong = []
    for pair in itertools.combinations(runs, 2):
        slow, fast = sorted(pair, key=lambda run: -run["measured"]["median"])
        differ = slow["measured"]["median"] > (1 + RANKED) * fast["measured"]["median"]
        if differ and slow["predicted"] <= fast["predicted"]:
            wrong.append([slow["run"], fast["run"]])
    return {
        "runs": list(runs),
        "mean_error": statistics.mean(sizes),
        "worst_error": max(sizes),
        "in_interval": sum(run["in_interval"] for run in runs),
        "wrong_order": wrong,
    }


if __name__ == "__main__":
    sys.exit(main())
