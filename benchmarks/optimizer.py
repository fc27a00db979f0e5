"""Optimizers compared with AdamW: what a step costs, and how fast the loss falls.

    python -m benchmarks.optimizer cost [--warmup 2] [--rounds 5] [--steps 2] [--write]
    python -m benchmarks.optimizer curves [--folder DIR] [--write]
    python -m benchmarks.optimizer draw

`cost` trains train_configs/debug.toml with each optimizer of OPTIMIZERS in each layout of LAYOUTS;
they take turns, of whole steps and of the optimizer's part alone, and ratios are by round.
`curves` trains a small model with AdamW and Muon at each learning rate of RATES with each of SEEDS.
Runs are kept below --folder, and those that are there are not repeated;
--write keeps the result in benchmarks/results/, and its table and picture in docs/optimizers.md.
`draw` draws the picture again from the result that is kept.
"""

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from benchmarks.command import add_turns, benchmark_parser, run_benchmark
from benchmarks.families import put
from benchmarks.manifest import RESULTS
from benchmarks.measure import (
    Run,
    Values,
    Variant,
    finish,
    measure,
    spread,
    start,
    take_turn,
)
from benchmarks.workers import Group
from titan_lite.dryrun.measure import recorder
from titan_lite.models.plan import make_plan
from titan_lite.training.open_run import open_run

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "optimizers.md"
CONFIG = "train_configs/debug.toml"

OPTIMIZERS: dict[str, tuple[str, ...]] = {
    "AdamW": (),
    "Muon": ("--optimizer.name=Muon",),
}
LAYOUTS: dict[str, tuple[str, ...]] = {"fsdp 4": (), "fsdp 2 x tp 2": ("--parallel.tp=2",)}
PROCESSES = 4

STEPS = 100
# Learning rates of `curves`. Muon's are adjusted to AdamW's, so both have the same range.
RATES = (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
SEEDS = (1, 2, 3)
SETTINGS = (
    "--model.num_layers=2",
    "--model.dim=128",
    "--model.ffn_dim=384",
    "--training.seq_len=128",
    "--training.local_batch_size=8",
    f"--training.steps={STEPS}",
    "--training.param_dtype=float32",
    "--lr_scheduler.warmup_steps=10",
    "--metrics.log_freq=1",
    "--metrics.peak_tflops=1.0",
    "--metrics.enable_tensorboard=false",
)
# A point of a curve is the mean of so many steps.
AVERAGE = 10


def optimizer_turn(steps: int) -> float:
    """Seconds of one step of the optimizer alone."""
    built = Run.trainer.built
    for parameter in built.model.parameters():
        parameter.grad = parameter.detach().clone()
    dist.barrier()
    begin = time.perf_counter()
    for _ in range(steps):
        built.train_step.optimizer.step()
    dist.barrier()
    seconds = (time.perf_counter() - begin) / steps
    built.train_step.optimizer.zero_grad()
    return seconds


def sent_and_held() -> Values:
    """Bytes that this rank hands to collectives in a step of the optimizer, and of its state."""
    built = Run.trainer.built
    recording = recorder(Run.trainer.plan.dims)
    for parameter in built.model.parameters():
        parameter.grad = parameter.detach().clone()
    with recording:
        built.train_step.optimizer.step()
    built.train_step.optimizer.zero_grad()
    state = [
        value.to_local() if isinstance(value, DTensor) else value
        for values in built.train_step.optimizer.state.values()
        for value in values.values()
        if isinstance(value, torch.Tensor)
    ]
    return {
        "sent": sum(n for (kind, *_), n in recording.work.items() if kind == "bytes"),
        "state": sum(tensor.nbytes for tensor in state),
        "parameters": built.num_params,
    }


def cost(layout: str, options: argparse.Namespace) -> list[Values]:
    """Measures every optimizer in a layout."""
    variants = [
        Variant(name, CONFIG, (*overrides, *LAYOUTS[layout], *options.overrides), PROCESSES)
        for name, overrides in OPTIMIZERS.items()
    ]
    whole: list[list[float]] = [[] for _ in variants]
    alone: list[list[float]] = [[] for _ in variants]
    with contextlib.ExitStack() as stack:
        groups = [stack.enter_context(Group(PROCESSES)) for _ in variants]
        for variant, group in zip(variants, groups, strict=True):
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            settings = variant.settings(folder, options.steps)
            group.call(start, CONFIG, settings, options.steps, options.warmup)
        for _ in range(options.rounds):
            for group, of_steps, of_optimizer in zip(groups, whole, alone, strict=True):
                of_steps.append(group.call(take_turn)[0]["seconds_per_step"])
                of_optimizer.append(max(group.call(optimizer_turn, options.steps)))
        results = []
        for index, (variant, group) in enumerate(zip(variants, groups, strict=True)):
            ranks = group.call(sent_and_held)
            group.call(finish)
            num_params = ranks[0]["parameters"]
            results.append(
                {
                    "optimizer": variant.name,
                    "layout": layout,
                    "step_over_adamw": spread(_ratios(whole[index], whole[0])),
                    "optimizer_over_adamw": spread(_ratios(alone[index], alone[0])),
                    "seconds_of_optimizer": spread(alone[index]),
                    "sent_bytes_per_parameter_and_rank": round(
                        max(rank["sent"] for rank in ranks) / num_params, 3
                    ),
                    "state_bytes_per_parameter": round(
                        sum(rank["state"] for rank in ranks) / num_params, 3
                    ),
                }
            )
    return results


def _ratios(seconds: Sequence[float], first: Sequence[float]) -> list[float]:
    return [own / reference for own, reference in zip(seconds, first, strict=True)]


def train(folder: str, overrides: Sequence[str]) -> None:
    """Trains into a run folder."""
    settings = [*SETTINGS, *overrides, f"--job.dump_folder={folder}"]
    trainer = open_run(make_plan(CONFIG, settings, 1))
    try:
        trainer.train()
    finally:
        trainer.close()


class Curves:
    """Losses and step times of runs, each trained on first use."""

    def __init__(self, folder: Path, group: Group) -> None:
        self.folder, self.group = folder, group

    def losses(self, name: str, lr: float, seed: int) -> list[float]:
        """The loss of each step."""
        target = self.folder / name / f"{lr:g}" / str(seed)
        file = target / "metrics.jsonl"
        if not file.exists() or len(file.read_text().splitlines()) < STEPS:
            own = (*OPTIMIZERS[name], f"--optimizer.lr={lr}", f"--training.seed={seed}")
            self.group.call(train, str(target), own)
        return [json.loads(line)["loss"] for line in file.read_text().splitlines()]

    def mean(self, name: str, lr: float, seeds: Sequence[int]) -> list[float]:
        """The mean over seeds, smoothed."""
        runs = [self.losses(name, lr, seed) for seed in seeds]
        means = [statistics.fmean(at) for at in zip(*runs, strict=True)]
        return [
            statistics.fmean(means[max(0, end - AVERAGE) : end]) for end in range(1, len(means) + 1)
        ]

    def best(self, name: str) -> tuple[float, dict[str, float]]:
        """The learning rate with the lowest final loss, and that loss at each."""
        final = {lr: self.mean(name, lr, SEEDS)[-1] for lr in RATES}
        return min(final, key=lambda lr: final[lr]), {f"{lr:g}": final[lr] for lr in final}


def curves(options: argparse.Namespace) -> Values:
    """AdamW's and Muon's best, and the step at which Muon has reached AdamW's final loss."""
    results: Values = {"settings": SETTINGS, "seeds": SEEDS, "average": AVERAGE, "optimizers": {}}
    with Group(1) as group:
        runs = Curves(options.folder, group)
        for name in ("AdamW", "Muon"):
            lr, final = runs.best(name)
            last = [statistics.fmean(runs.losses(name, lr, seed)[-AVERAGE:]) for seed in SEEDS]
            results["optimizers"][name] = {
                "lr": lr,
                "final_loss_by_lr": final,
                "final_loss_by_seed": last,
                "curve": [round(loss, 4) for loss in runs.mean(name, lr, SEEDS)],
            }
    adamw, muon = (results["optimizers"][name]["curve"] for name in ("AdamW", "Muon"))
    reached = next((step for step, loss in enumerate(muon, 1) if loss <= adamw[-1]), None)
    return results | {
        "steps": len(adamw),
        "muon_reaches_adamw_at": reached,
        "step_over_adamw": step_over_adamw(options),
    }


def step_over_adamw(options: argparse.Namespace) -> Values:
    """The time of Muon's step over AdamW's, of the model of `curves` in one process."""
    settings = [
        s
        for s in SETTINGS
        if not s.startswith(("--training.steps", "--metrics.log", "--metrics.enable"))
    ]
    variants = [Variant(name, CONFIG, (*settings, *OPTIMIZERS[name])) for name in ("AdamW", "Muon")]
    results = measure(variants, options)
    ratio: Values = results[1]["over_first"]["seconds_per_step"]
    return ratio


def draw(optimizers: Mapping[str, Any], path: Path) -> None:
    """Draws the losses of both, and the final ones at each learning rate."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, of_one in optimizers.items():
        curve = of_one["curve"]
        label = f"{name}, lr {of_one['lr']:g}"
        left.plot(range(1, len(curve) + 1), curve, label=label, linewidth=1.2)
        rates = of_one["final_loss_by_lr"]
        right.plot([float(lr) for lr in rates], rates.values(), "o-", label=name)
    final = optimizers["AdamW"]["curve"][-1]
    left.axhline(final, color="0.45", linestyle="--", linewidth=1)
    left.set(xlabel="step", ylabel="loss, nats per token", title="best learning rate, 3 seeds")
    right.set(xlabel="learning rate", xscale="log", title="final loss, 3 seeds")
    right.set_xticks(RATES, [f"{lr:g}" for lr in RATES])
    right.minorticks_off()
    for axes in (left, right):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def table(result: Values) -> str:
    """The result of `curves` as Markdown."""
    lines = [
        "| optimizer | best learning rate | final loss, mean of 3 seeds | smallest, largest |",
        "|---|---:|---:|---|",
    ]
    for name, of_one in result["optimizers"].items():
        last = of_one["final_loss_by_seed"]
        lines.append(
            f"| {name} | {of_one['lr']:g} | {statistics.fmean(last):.3f} "
            f"| {min(last):.3f}, {max(last):.3f} |"
        )
    reached = result["muon_reaches_adamw_at"]
    ratio = result["step_over_adamw"]["median"]
    low, high = result["step_over_adamw"]["quartiles"]
    longer = f"Its step takes {ratio:.2f} times as long (quartiles {low:.2f} to {high:.2f})"
    if reached:
        time = reached / result["steps"] * ratio
        answer = (
            f"Muon reaches AdamW's final loss at step {reached} of {result['steps']}. {longer}, so "
            f"this\nis {time:.2f} of AdamW's wall time."
        )
    else:
        answer = f"Muon does not reach AdamW's final loss. {longer}."
    return "\n".join([*lines, "", answer]) + "\n"


def cost_table(results: Sequence[Values]) -> str:
    """The result of `cost` as Markdown."""
    lines = [
        "| optimizer | layout | time of a training step / AdamW's "
        "| time of the optimizer's part / AdamW's "
        "| bytes sent by a rank, per parameter | state, bytes per parameter |",
        "|---|---|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {r['optimizer']} | {r['layout']} | {r['step_over_adamw']['median']:.2f} "
        f"| {r['optimizer_over_adamw']['median']:.1f} "
        f"| {r['sent_bytes_per_parameter_and_rank']:.2f} | {r['state_bytes_per_parameter']:.2f} |"
        for r in results
    ]
    return "\n".join(lines) + "\n"


def measured(options: argparse.Namespace) -> Any:
    """Measures every layout, trains the curves, or returns those that are kept."""
    if options.what == "draw":
        return json.loads((RESULTS / "optimizer_curves.json").read_text())["results"]
    if options.write:
        options.output = f"optimizer_{options.what}.json"
    if options.what == "curves":
        return curves(options)
    return [result for layout in LAYOUTS for result in cost(layout, options)]


def report(options: argparse.Namespace, results: Any, text: str) -> None:
    """Prints the result; updates page and picture with --write, the picture alone for `draw`."""
    if options.what != "draw":
        print(text)
        if options.write:
            new = table(results) if options.what == "curves" else cost_table(results)
            PAGE.write_text(put(PAGE.read_text(), options.what, new))
    if options.what == "draw" or (options.what == "curves" and options.write):
        draw(results["optimizers"], PAGE.with_suffix(".png"))


def main(argv: Sequence[str] | None = None) -> int:
    parser = benchmark_parser("optimizer", __doc__)
    parser.add_argument("what", choices=("cost", "curves", "draw"))
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs" / "optimizer")
    parser.add_argument("--write", action="store_true", help="into benchmarks/results/ and docs/")
    add_turns(parser, warmup=2, rounds=5, steps=2)
    return run_benchmark(parser, argv, measured, takes_overrides=True, report=report)


if __name__ == "__main__":
    sys.exit(main())
