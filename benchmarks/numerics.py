"""Pairs of runs that should have the same curve, compared by their tier of titan-lite compare.

    python -m benchmarks.numerics [--steps 300] [--only NAME ...] [--write]

Trains train_configs/debug.toml, in float32 unless a pair sets a dtype, 4 samples a step, with a
learning rate of 1e-3. Runs are kept below --folder and not repeated. Prints a Markdown table;
--write puts it into docs/numerics.md, and with matplotlib a picture of each pair into
docs/numerics/.
"""

import argparse
import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.command import benchmark_parser, positive, run_benchmark
from titan_lite.regression.compare import Comparison, Tier, compare
from titan_lite.regression.curves import METRICS_FILE, CurveError, read_curve, read_records
from titan_lite.regression.plot import plot
from titan_lite.regression.run_training import run_training

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "train_configs" / "debug.toml"
DOCS = ROOT / "docs" / "numerics.md"
TABLE = re.compile(r"(<!-- table -->\n).*(<!-- end of table -->)", re.DOTALL)
RESUMED = "resumed"


@dataclass(frozen=True)
class Side:
    """A run: the number of processes, and settings added to those of all runs."""

    nproc: int = 1
    settings: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """Returns a run's label in a picture's legend."""
        return ", ".join((f"{self.nproc} process{'es' * (self.nproc > 1)}", *self.settings))


@dataclass(frozen=True)
class Pair:
    """Two runs and the tier that their distance must be within."""

    name: str
    tier: Tier
    b: Side
    a: Side = Side()


# At debug.toml's rate of 3e-3, training amplifies rounding a hundredfold: docs/numerics.md.
RUN = ("training.global_batch_size=4", "training.local_batch_size=4", "optimizer.lr=1e-3")


def _dp(ranks: int, *settings: str) -> Side:
    return Side(ranks, (f"training.local_batch_size={4 // ranks}", *settings))


BFLOAT16 = ("training.param_dtype=bfloat16",)
FULL, SELECTIVE = "activation_checkpoint.mode=full", "activation_checkpoint.mode=selective_op"
PAIRS = (
    Pair("the same again", "bitwise", Side(settings=("job.description=again",))),
    Pair(RESUMED, "bitwise", Side(settings=("checkpoint.enable=true",))),
    Pair("dp2", "layout", _dp(2)),
    Pair("dp4", "layout", _dp(4)),
    Pair("hsdp 2x2", "layout", _dp(4, "parallel.dp_replicate=2")),
    Pair("tp2", "layout", Side(2, ("parallel.tp=2",))),
    Pair("accumulation x 4", "layout", Side(1, ("training.local_batch_size=1",))),
    Pair("checkpointing full", "layout", Side(settings=(FULL,))),
    Pair("checkpointing selective_op", "layout", Side(settings=(SELECTIVE,))),
    Pair("compile", "layout", Side(settings=("compile.enable=true",))),
    Pair("dp2 in bfloat16", "layout", _dp(2, *BFLOAT16), Side(settings=BFLOAT16)),
    Pair("bfloat16", "statistical", Side(settings=BFLOAT16)),
    Pair("another seed", "statistical", Side(settings=("training.seed=1",))),
)


def run(side: Side, steps: int, folder: Path) -> Path:
    """Returns the folder of a run of `side`; trains it unless it is complete."""
    words = "_".join([str(side.nproc), *side.settings]) or "1"
    target = folder / f"{steps}_{re.sub(r'[^a-z0-9_.=]+', '-', words)}"
    if (target / METRICS_FILE).exists() and read_records(target)[-1]["step"] == steps:
        return target
    settings = [
        f"training.steps={steps}",
        *RUN,
        "training.param_dtype=float32",
        "metrics.peak_tflops=1.0",
        *side.settings,
    ]
    overrides = [f"--{setting}" for setting in settings]
    if "checkpoint.enable=true" not in side.settings:
        run_training(CONFIG, overrides, side.nproc, target)
        return target
    overrides.append(f"--checkpoint.interval={max(steps // 2, 1)}")
    run_training(CONFIG, overrides, side.nproc, target)
    # A crash in the second half: everything is written except the last checkpoint.
    shutil.rmtree(target / "checkpoint" / f"step-{steps}")
    run_training(CONFIG, overrides, side.nproc, target)
    return target


def row(pair: Pair, comparison: Comparison | CurveError) -> str:
    """Returns a line of the table."""
    label = f"| {pair.name} | {pair.tier} |"
    if isinstance(comparison, CurveError):
        return f"{label} {comparison} | | |"
    outside = comparison.first_outside
    verdict = "within"
    if outside is not None:
        verdict = f"**outside** at step {comparison.a.steps[outside[1]]}"
    cells = []
    for name in ("loss", "grad_norm"):
        track = comparison.tracks[name]
        worst = track.worst
        cells.append(f"{abs(track.difference[worst]):.1e} of {track.band[worst]:.1e}")
    return f"{label} {verdict} | {cells[0]} | {cells[1]} |"


def measured(options: argparse.Namespace) -> dict[str, Comparison | CurveError]:
    """Runs and compares the pairs."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if options.write:
        options.output = "numerics.json"
    pictures = DOCS.with_suffix("") if options.write else options.folder
    pictures.mkdir(parents=True, exist_ok=True)
    comparisons: dict[str, Comparison | CurveError] = {}
    for pair in PAIRS:
        if options.only and pair.name not in options.only:
            continue
        sides = [(side, run(side, options.steps, options.folder)) for side in (pair.a, pair.b)]
        try:
            curves = [replace(read_curve(folder), name=side.label) for side, folder in sides]
            comparisons[pair.name] = comparison = compare(*curves, pair.tier)
        except CurveError as usage_error:
            comparisons[pair.name] = usage_error
        else:
            if importlib.util.find_spec("matplotlib"):
                plot(comparison, pictures / f"{pair.name.replace(' ', '_')}.png")
        print(row(pair, comparisons[pair.name]), file=sys.stderr, flush=True)
    return comparisons


def stored(comparisons: Mapping[str, Comparison | CurveError]) -> dict[str, Any]:
    """Returns the comparisons for JSON, without pairs that cannot be compared."""
    return {name: c.report() for name, c in comparisons.items() if isinstance(c, Comparison)}


def report(
    options: argparse.Namespace, comparisons: Mapping[str, Comparison | CurveError], text: str
) -> int:
    """Prints results and table; returns 1 if a pair is outside."""
    lines = [
        f"{options.steps} steps of {CONFIG.name} with `{' '.join(RUN)}`,",
        "in float32 unless the name of the run has another dtype:",
        "",
        "| run | tier | verdict | loss | gradient norm |",
        "|---|---|---|---|---|",
        *(row(pair, comparisons[pair.name]) for pair in PAIRS if pair.name in comparisons),
    ]
    table = "\n".join(lines) + "\n"
    print(text)
    print(table)
    if options.write:
        page = TABLE.sub(lambda match: match[1] + table + match[2], DOCS.read_text())
        DOCS.write_text(page)
    return int(any(r["verdict"] == "outside" for r in stored(comparisons).values()))


def main(argv: Sequence[str] | None = None) -> int:
    parser = benchmark_parser("numerics", __doc__)
    parser.add_argument("--steps", type=positive, default=300)
    parser.add_argument("--only", nargs="+", choices=[pair.name for pair in PAIRS], metavar="NAME")
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs" / "numerics")
    parser.add_argument("--write", action="store_true", help="into docs/")
    return run_benchmark(parser, argv, measured, stored=stored, report=report)


if __name__ == "__main__":
    sys.exit(main())
