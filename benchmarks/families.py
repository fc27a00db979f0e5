"""The debug flavor of every family: its loss curve, and its speed over transformers' own model.

    python -m benchmarks.families curves [--only NAME ...] [--folder DIR] [--write]
    python -m benchmarks.families long [--only NAME ...] [--folder DIR] [--write]
    python -m benchmarks.families speed [--only NAME ...] [--dtypes float32 bfloat16]
        [--batch 8] [--seq-len 256] [--warmup 4] [--rounds 12] [--steps 2] [--write]

`curves` trains each with train_configs/debug.toml, in 2 processes; runs are kept below --folder
and not repeated. `long` trains BERT until it has learnt from context; each point of the curve is
the mean of some steps. `speed` trains our model and transformers' with the same weights in the same
bare loop: torch's cross_entropy of all positions, and for BERT of pairs as well, clipping and fused
AdamW, under autocast in bfloat16, without dropout, on batches of the family's preset. Each of the
two has a separate process; their first losses must agree, then they take turns of `steps` steps,
and ratios are by round. A family that is not in transformers has no speed.
--write keeps the result in benchmarks/results/ and puts it into docs/families.md.
"""

import argparse
import contextlib
import math
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.bare_loop import OURS, THEIRS, start, take_turn
from benchmarks.command import add_turns, benchmark_parser, positive, run_benchmark
from benchmarks.measure import Values, spread
from benchmarks.workers import BenchmarkError, Group
from titan_lite.models.family import Family
from titan_lite.models.registry import families
from titan_lite.planner.counts import in_words, num_params
from titan_lite.regression.curves import CurveError, read_facts, read_records
from titan_lite.regression.run_training import run_training

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "families.md"
SPEED = "families.json"
CONFIGS = ROOT / "train_configs"
# Presets of families that are not causal language models; all others have debug.toml.
PRESETS = {"bert": "debug_bert.toml", "megatron_bert": "debug_bert.toml"}
# Nats per training token of the corpus, printed by scripts/train_tokenizer.py.
UNIGRAM_ENTROPY = 6.32
# Relative tolerance of the first losses, by dtype.
AGREE = {"float32": 1e-5, "bfloat16": 1e-2}

Curves = dict[str, dict[str, list[float]]]


class Runs(NamedTuple):
    """Runs of presets with some settings; `average` records make a point of a curve."""

    result: str
    picture: Path
    settings: tuple[str, ...]
    average: int


RUNS = {
    "curves": Runs("family_curves.json", PAGE.with_suffix(".png"), ("--metrics.log_freq=5",), 1),
    "long": Runs(
        "bert_curves.json",
        PAGE.with_name("bert.png"),
        (
            "--metrics.log_freq=1",
            "--training.steps=1500",
            # With shorter sequences and more masked tokens, the model learns sooner.
            "--model.num_layers=2",
            "--training.seq_len=32",
            "--training.local_batch_size=64",
            "--masked_lm.mask_prob=0.4",
            "--training.loss_positions=labelled",
            "--optimizer.lr=1.5e-3",
            "--lr_scheduler.warmup_steps=50",
        ),
        25,
    ),
}


def preset(name: str) -> Path:
    return CONFIGS / PRESETS.get(name, "debug.toml")


def train(name: str, folder: Path, runs: Runs) -> dict[str, list[float]]:
    """Returns steps and losses of a family's run in `folder`; trains it unless it is complete."""
    target = folder / name
    records: list[dict[str, Any]] = []
    with contextlib.suppress(CurveError):
        steps = read_facts(target)["config"]["training"]["steps"]
        records = [record for record in read_records(target) if record["step"] <= steps]
    if not records or records[-1]["step"] != steps:
        run_training(preset(name), [f"--model.name={name}", *runs.settings], 2, target)
        records = read_records(target)
    return points(records, runs.average)


def points(records: Sequence[Mapping[str, Any]], average: int) -> dict[str, list[float]]:
    """Returns the points of a curve: means of `average` records, at their last steps."""
    # The loss of tokens, without that of pairs.
    columns = {"loss": [record.get("masked_lm_loss", record["loss"]) for record in records]}
    if (right := "next_sentence_accuracy") in records[0]:
        columns[right] = [record[right] for record in records]
    ends = range(average, len(records) + 1, average)
    means = {
        name: [round(statistics.fmean(values[end - average : end]), 4) for end in ends]
        for name, values in columns.items()
    }
    return {"steps": [records[end - 1]["step"] for end in ends], **means}


def draw(curves: Curves, path: Path) -> None:
    """Writes a picture of all curves, each with its name and its last loss at its end."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    last = max(curve["steps"][-1] for curve in curves.values())
    lowest = min(min(curve["loss"]) for curve in curves.values())
    highest = max(max(curve["loss"]) for curve in curves.values())
    axes.set_xlim(1, last)
    axes.axhline(UNIGRAM_ENTROPY, color="0.45", linestyle="--", linewidth=1)
    words = f"unigram entropy of the corpus, {UNIGRAM_ENTROPY} nats"
    axes.text(last, UNIGRAM_ENTROPY - 0.05, words, color="0.35", ha="right", va="top", fontsize=9)
    ends = {name: curve["loss"][-1] for name, curve in curves.items()}
    gap = (highest - lowest) / 20
    places = apart(ends, gap)
    axes.set_ylim(min(lowest, *places.values()) - gap, highest + gap)
    for index, (name, curve) in enumerate(curves.items()):
        color = f"C{index}"
        style = ":" if name in PRESETS else "-"
        axes.plot(curve["steps"], curve["loss"], style, color=color, linewidth=1.2)
        label = f"{name}  {ends[name]:.2f}" + (" (masked tokens)" if name in PRESETS else "")
        x = 1.02 * last
        axes.plot([last, x], [ends[name], places[name]], color=color, linewidth=0.5, clip_on=False)
        axes.text(x, places[name], f" {label}", color=color, va="center", fontsize=9)
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per token")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def apart(heights: Mapping[str, float], gap: float) -> dict[str, float]:
    """Returns the heights, in the same order, moved until no two are nearer than `gap`."""
    names = sorted(heights, key=lambda name: heights[name])
    places: list[float] = []
    for name in names:
        places.append(max(heights[name], places[-1] + gap if places else -math.inf))
    # The mean shift is 0.
    shift = statistics.fmean(
        place - heights[name] for name, place in zip(names, places, strict=True)
    )
    return {name: place - shift for name, place in zip(names, places, strict=True)}


def comparable(family: Family) -> bool:
    """Returns whether transformers has the same model."""
    return family.hf_config is not None


def race(groups: Mapping[str, Group], name: str, dtype: str, options: Any) -> Values:
    """Measures tokens per second of both sides of one family, and their ratios by round."""
    shape = (options.batch, options.seq_len)
    first = {}
    for side, group in groups.items():
        group.call(start, side, name, preset(name), dtype, shape)
        ((_, first[side]),) = group.call(take_turn, 1)
        group.call(take_turn, options.warmup)
    if not math.isclose(*first.values(), rel_tol=AGREE[dtype]):
        losses = " and ".join(f"{side} {loss}" for side, loss in first.items())
        raise BenchmarkError(f"{name} in {dtype}: the first losses differ, {losses}")
    seconds: dict[str, list[float]] = {side: [] for side in groups}
    differences = []
    for _ in range(options.rounds):
        losses = {}
        for side, group in groups.items():
            ((taken, losses[side]),) = group.call(take_turn, options.steps)
            seconds[side].append(taken)
        differences.append(abs(losses[OURS] / losses[THEIRS] - 1))
    tokens = options.batch * options.seq_len * options.steps
    pairs = zip(seconds[THEIRS], seconds[OURS], strict=True)
    return {
        "family": name,
        "dtype": dtype,
        "tokens_per_second": {
            side: round(tokens / statistics.median(taken), 1) for side, taken in seconds.items()
        },
        "over_transformers": spread([peer / local for peer, local in pairs]),
        "largest_relative_loss_difference": max(differences),
    }


def measure_speed(options: argparse.Namespace) -> Values:
    """Measures every family that transformers has, in every dtype."""
    import transformers

    names = [name for name in options.only if comparable(families()[name])]
    results = []
    with Group(1) as local, Group(1) as peer:
        for name in names:
            for dtype in options.dtypes:
                results.append(race({OURS: local, THEIRS: peer}, name, dtype, options))
                print(speed_row(results[-1]), file=sys.stderr, flush=True)
        threads = local.threads
    return {
        "transformers": transformers.__version__,
        "samples": options.batch,
        "seq_len": options.seq_len,
        "threads_per_process": threads,
        "families": results,
    }


def flavors_table() -> str:
    """Returns every family's flavors and their exact numbers of parameters, as Markdown."""
    columns = ("layers", "width", "query, key heads", "vocabulary", "`max_seq_len`", "parameters")
    lines = [f"| family | flavor | {' | '.join(columns)} |", "|---|---|" + "---:|" * len(columns)]
    for name, family in families().items():
        for flavor, args in family.flavors.items():
            heads = f"{args.num_heads}, {args.num_kv_heads}"
            numbers = (args.num_layers, args.dim, heads, args.vocab_size, args.max_seq_len)
            cells = [number if isinstance(number, str) else f"{number:,}" for number in numbers]
            cells += [in_words(num_params(args), args)]
            lines.append(f"| `{name}` | `{flavor}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def speed_table(results: Values) -> str:
    """Returns the result of `speed` as Markdown."""
    lines = [
        f"titan_lite over transformers {results['transformers']}, {results['samples']} samples of "
        f"{results['seq_len']} tokens a step, threads: {results['threads_per_process']}.",
        "",
        "| family | dtype | titan_lite, tokens/s | transformers, tokens/s | ratio | quartiles |",
        "|---|---|---:|---:|---:|---|",
        *map(speed_row, results["families"]),
    ]
    return "\n".join(lines) + "\n"


def speed_row(result: Values) -> str:
    """Returns a line of the table."""
    local, peer = (f"{result['tokens_per_second'][side]:,.0f}" for side in (OURS, THEIRS))
    ratio = result["over_transformers"]
    low, high = ratio["quartiles"]
    return (
        f"| `{result['family']}` | {result['dtype']} | {local} | {peer} | {ratio['median']:.2f} "
        f"| {low:.2f} to {high:.2f} |"
    )


def put(page: str, name: str, text: str) -> str:
    """Returns the page with the part of that name replaced by `text`."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    pattern = re.compile(f"({re.escape(begin)}).*({re.escape(end)})", re.DOTALL)
    return pattern.sub(lambda match: match[1] + text + match[2], page)


def measured(options: argparse.Namespace) -> Values:
    """Measures the speeds, or trains the runs."""
    options.only = options.only or (["megatron_bert"] if options.what == "long" else families())
    runs = RUNS.get(options.what)
    if options.write:
        options.output = options.output or (runs.result if runs else SPEED)
    if runs is None:
        return measure_speed(options)
    return {name: train(name, options.folder / options.what, runs) for name in options.only}


def report(options: argparse.Namespace, results: Values, text: str) -> None:
    """Prints the result, draws curves, and updates the page with --write."""
    print(text)
    page = put(PAGE.read_text(), "flavors", flavors_table())
    if options.what == "speed":
        page = put(page, "speed", speed_table(results))
    else:
        picture = (options.folder / options.what).with_suffix(".png")
        draw(results, RUNS[options.what].picture if options.write else picture)
    if options.write:
        PAGE.write_text(page)


def main(argv: Sequence[str] | None = None) -> int:
    parser = benchmark_parser("families", __doc__)
    parser.add_argument("what", choices=(*RUNS, "speed"))
    parser.add_argument("--only", nargs="+", choices=families(), metavar="NAME")
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs" / "families")
    parser.add_argument("--dtypes", nargs="+", choices=AGREE, default=list(AGREE))
    parser.add_argument("--batch", type=positive, default=8, help="samples of a step")
    parser.add_argument("--seq-len", type=positive, default=256, help="in tokens")
    add_turns(parser, warmup=4, rounds=12, steps=2)
    parser.add_argument("--write", action="store_true", help="into benchmarks/results/ and docs/")
    return run_benchmark(parser, argv, measured, report=report)


if __name__ == "__main__":
    sys.exit(main())
