"""Measures variants of a run side by side: each has its own processes, and they take turns.

Step time, WPS, MFU and memory come from the library's own meter, one window per turn; the turns of
the others are excluded.
"""

import argparse
import contextlib
import json
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.workers import BenchmarkError, Group
from titan_lite.config.load import ConfigError
from titan_lite.metrics.record import Record
from titan_lite.models.plan import make_plan
from titan_lite.runtime.distributed import Process
from titan_lite.runtime.garbage import GarbageCollector
from titan_lite.runtime.run_folder import RUN_FILE
from titan_lite.training.open_run import open_run
from titan_lite.training.trainer import Trainer

Values = dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """A run of `config` with overrides (--section.key=value) on `nproc` processes."""

    name: str
    config: str
    overrides: tuple[str, ...] = ()
    nproc: int = 1

    def settings(self, folder: str, turn: int) -> list[str]:
        """Returns all overrides of a run whose turns of `turn` steps are logged at their end.

        Raises BenchmarkError for an override that measuring sets itself, or that is rejected.
        """
        own = {
            "job.dump_folder": folder,
            # Never reached.
            "training.steps": 1_000_000,
            "metrics.log_freq": turn,
            "metrics.enable_tensorboard": "false",
            "checkpoint.enable": "false",
        }
        for override in self.overrides:
            if (key := override.removeprefix("--").partition("=")[0]) in own:
                raise BenchmarkError(f"{self.name}: {key} is set by the benchmark itself")
        settings = [*self.overrides, *(f"--{key}={value}" for key, value in own.items())]
        try:
            make_plan(self.config, settings, self.nproc)
        except ConfigError as error:
            raise BenchmarkError(f"{self.name}: {error}") from error
        return settings


def measure(
    variants: Sequence[Variant],
    turns: argparse.Namespace,
    *,
    extra: Callable[[], Values] | None = None,
) -> list[Values]:
    """Returns one result per variant: `rounds` turns of `steps` steps after `warmup` or more steps.

    turns: the options of benchmarks.command.add_turns. Ratios to the first variant are medians over
    the rounds. `extra` is called in each process after the last round; its values on rank 0 are
    added to the result.
    """
    warmup_turns = math.ceil(turns.warmup / turns.steps)
    with contextlib.ExitStack() as stack:
        settings = [
            variant.settings(folder, turns.steps)
            for variant in variants
            for folder in [stack.enter_context(tempfile.TemporaryDirectory())]
        ]
        groups = [stack.enter_context(Group(variant.nproc)) for variant in variants]
        for variant, group, overrides in zip(variants, groups, settings, strict=True):
            with _named(variant):
                group.call(start, variant.config, overrides, turns.steps, warmup_turns)
        records: list[list[Record]] = [[] for _ in variants]
        for _ in range(turns.rounds):
            for group, windows in zip(groups, records, strict=True):
                windows.append(group.call(take_turn)[0])
        results = []
        for variant, group, windows in zip(variants, groups, records, strict=True):
            result: Values = {
                "variant": variant.name,
                "config": variant.config,
                "with": list(variant.overrides),
                "processes": variant.nproc,
                "threads_per_process": group.threads,
                **summary(windows),
            }
            if extra is not None:
                result |= group.call(extra)[0]
            result |= group.call(finish)[0]
            if windows is not records[0]:
                result["over_first"] = ratios(windows, records[0])
            results.append(result)
    return results


@contextlib.contextmanager
def _named(variant: Variant) -> Iterator[None]:
    try:
        yield
    except BenchmarkError as error:
        raise BenchmarkError(f"{variant.name}: {error}") from error


def summary(windows: Sequence[Record]) -> Values:
    """Returns medians over the turns, and the spread of the step time."""
    seconds = [window["seconds_per_step"] for window in windows]
    mfu = [window["mfu"] for window in windows if "mfu" in window]
    return {
        "seconds_per_step": spread(seconds),
        "wps": round(statistics.median(window["wps"] for window in windows), 1),
        "mfu": round(statistics.median(mfu), 2) if mfu else None,
        "peak_memory_gib": round(max(window["memory_gib"] for window in windows), 3),
    }


def ratios(windows: Sequence[Record], first: Sequence[Record]) -> Values:
    """Returns the ratios of this variant over the first one, by round."""
    return {
        key: spread([a[key] / b[key] for a, b in zip(windows, first, strict=True)])
        for key in ("seconds_per_step", "wps")
    }


def spread(values: Sequence[float]) -> Values:
    """Returns median, quartiles, minimum and maximum."""
    quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values
    return {
        "median": round(statistics.median(values), 5),
        "quartiles": [round(quartiles[0], 5), round(quartiles[-1], 5)],
        "range": [round(min(values), 5), round(max(values), 5)],
    }


class Run:
    """The run of this process, between its turns."""

    trainer: Trainer
    turn: int
    step: int
    stack: contextlib.ExitStack
    pause: contextlib.ExitStack


def start(config: str, overrides: list[str], turn: int, warmup_turns: int) -> None:
    """Builds the trainer of this process and warms it up."""
    plan = make_plan(config, overrides, Process.from_environment().world_size)
    Run.trainer = trainer = open_run(plan)
    Run.turn, Run.step = turn, 0
    Run.stack, Run.pause = contextlib.ExitStack(), contextlib.ExitStack()
    Run.stack.enter_context(GarbageCollector(plan.config.training.gc_freq))
    for _ in range(warmup_turns):
        take_turn()
    trainer.report_compiled()


def take_turn() -> Record:
    """Trains for one turn, as Trainer.train does, and returns its record."""
    dist.barrier()
    Run.pause.close()
    for _ in range(Run.turn):
        Run.step += 1
        record = Run.trainer.train_step(Run.step)
    Run.pause.enter_context(Run.trainer.monitor.meter.excluded())
    assert record is not None, "the last step of a turn is logged"
    return record


def forward_and_backward() -> None:
    """Runs forward and backward of the next micro-batch, without an optimizer step."""
    step = Run.trainer.built.train_step
    micro_batch = step.inputs.split_for_cp(next(Run.trainer.data.batches))
    terms = step.inputs.loss_terms(torch.ones(2, device=step.inputs.device))
    step.forward_backward([micro_batch], terms)


def finish() -> Values:
    """Ends the run; returns the applied features, and the peak that MFU is relative to."""
    trainer = Run.trainer
    Run.stack.close()
    trainer.close()
    if trainer.process.rank != 0:
        return {}
    run_file = json.loads((trainer.plan.run_folder / RUN_FILE).read_text())
    # Names of hundreds of modules would hide the numbers.
    counts = {feature: len(names) for feature, names in run_file["applied"]["modules"].items()}
    applied = run_file["applied"] | {"modules": counts}
    return {"parameters": run_file["parameters"], "applied": applied, "peak": run_file["peak"]}
