"""Faults put in on purpose, in runs of a few steps: compare reports each as outside, with its step.

The same runs without a fault are within: what is called outside is the fault. Valid tokens are
uneven over samples and ranks.
"""

import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist
from torch import Tensor

from tests.distributed import Workers
from tests.parallel.test_planted_bugs import average_over_ranks, leave_norms_unsynchronised
from tests.runs import build_trainer, masked, slow_but
from titan_lite.checkpoint.manager import CheckpointManager
from titan_lite.data import loader
from titan_lite.data.packing import IGNORED
from titan_lite.optim import optimizer, schedule
from titan_lite.regression.compare import Tier, compare
from titan_lite.regression.curves import read_curve
from titan_lite.training import step
from titan_lite.training.inputs import LossTerms
from titan_lite.training.step import TrainStep

Plant = Callable[[], AbstractContextManager[Any]]

# Without clipping, which would hide how large a gradient is.
STEPS = (
    "--training.steps=6",
    "--training.seq_len=32",
    "--model.num_layers=1",
    "--training.max_norm=0",
    "--lr_scheduler.decay_type=constant",
)
DP2 = ("--training.local_batch_size=4",)
TP2 = ("--parallel.tp=2",)
# Weights that outgrow their first scale within the run.
FLOAT8 = (
    "--float8.recipe=tensorwise",
    "--float8.emulate=true",
    "--float8.fsdp_all_gather=true",
    "--optimizer.lr=3e-2",
    "--training.steps=7",
)
SAVED = ("--checkpoint.enable=true", "--checkpoint.interval=3")


def divide_by_the_ranks_own_tokens() -> AbstractContextManager[Any]:
    """A mean of the ranks' means, where they have different numbers of valid tokens."""
    forward_backward = TrainStep.forward_backward

    def wrong(self: TrainStep, micro_batches: Any, terms: LossTerms) -> Tensor:
        valid = sum((batch.labels != IGNORED).sum() for batch in micro_batches)
        assert self.meshes.loss is not None
        factor = 1 / (valid * self.meshes.loss.size())
        return forward_backward(self, micro_batches, replace(terms, token_factor=factor))

    return mock.patch.object(TrainStep, "forward_backward", wrong)


def shuffle_by_rank() -> AbstractContextManager[Any]:
    """The order of the data changed by the layout, while ranks agree on their settings."""
    right = loader.Stream

    def wrong(*args: Any, seed: int, **kwargs: Any) -> loader.Stream:
        return right(*args, seed=seed + dist.get_rank(), **kwargs)

    return mock.patch.object(loader, "Stream", wrong)


def begin_the_schedule_a_step_late() -> AbstractContextManager[Any]:
    right = schedule.lr_factor
    return mock.patch.object(schedule, "lr_factor", lambda step, *args: right(step - 1, *args))


def decay_norms() -> AbstractContextManager[Any]:
    return mock.patch.object(optimizer, "_decay_kind", return_value="weight")


def keep_the_first_scales() -> AbstractContextManager[Any]:
    """Weights gathered in float8 by the scales of the first step."""
    calls = iter([step.refresh_scales])
    return mock.patch.object(
        step, "refresh_scales", lambda model: next(calls, lambda _: None)(model)
    )


def forget_the_optimizer() -> AbstractContextManager[Any]:
    load = CheckpointManager.load

    def wrong(self: CheckpointManager, step: int) -> None:
        load(self, step)
        self.optimizer.state.clear()

    return mock.patch.object(CheckpointManager, "load", wrong)


def train(plant: Plant, folder: Path, *overrides: str) -> None:
    with plant():
        run = build_trainer(folder, *STEPS, *overrides)
        run.data.batches = masked(run.data.batches)
        try:
            run.train()
        finally:
            run.close()


class Runs:
    """Folders of runs without a fault, each made once."""

    def __init__(self, workers: Mapping[int, Workers], folders: pytest.TempPathFactory) -> None:
        self.workers, self.folders = workers, folders
        self.faultless: dict[tuple[str, ...], Path] = {}

    def __call__(self, world_size: int, *overrides: str, plant: Plant | None = None) -> Path:
        key = (str(world_size), *overrides)
        if plant is None and key in self.faultless:
            return self.faultless[key]
        folder = self.folders.mktemp("run")
        self.workers[world_size].run(train, plant or nullcontext, folder, *overrides)
        return folder if plant else self.faultless.setdefault(key, folder)


@pytest.fixture(scope="module")
def runs(workers: Mapping[int, Workers], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(workers, tmp_path_factory)


def outside(a: Path, b: Path, tier: Tier = "layout") -> dict[str, int]:
    """The quantities outside their bands, each with the first step."""
    comparison = compare(read_curve(a), read_curve(b), tier)
    steps = comparison.a.steps
    return {name: int(steps[t.outside[0]]) for name, t in comparison.tracks.items() if t.outside}


FAULTS = (
    # Adam divides a gradient by its size: the loss does not show it.
    (average_over_ranks, 2, DP2, {"grad_norm": 1}),
    (leave_norms_unsynchronised, 2, TP2, {"grad_norm": 1, "loss": 2}),
    (divide_by_the_ranks_own_tokens, 2, DP2, {"loss": 1, "grad_norm": 1}),
    (shuffle_by_rank, 2, DP2, {"loss": 1, "grad_norm": 1}),
    (begin_the_schedule_a_step_late, 1, (), {"lr": 1, "loss": 2, "grad_norm": 2}),
    (decay_norms, 1, (), {"loss": 3, "grad_norm": 3}),
)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("plant", "world_size", "settings", "actual"),
    slow_but(FAULTS[-2:], FAULTS),
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_fault_is_outside_the_layout_tier(
    plant: Plant, world_size: int, settings: tuple[str, ...], actual: dict[str, int], runs: Runs
) -> None:
    assert outside(runs(1), runs(world_size, *settings)) == {}
    assert outside(runs(1), runs(world_size, *settings, plant=plant)) == actual


@pytest.mark.distributed
def test_a_stale_float8_scale_is_outside_the_layout_tier(runs: Runs) -> None:
    gathered, plain = runs(1, *FLOAT8), runs(1, *FLOAT8[:2], *FLOAT8[3:])
    assert outside(plain, gathered) == {}
    stale = runs(1, *FLOAT8, plant=keep_the_first_scales)
    assert outside(plain, stale) == {"loss": 6}
    assert outside(gathered, stale, "bitwise") == {"loss": 2, "grad_norm": 2}


@pytest.mark.distributed
def test_an_optimizer_that_forgets_at_resume_is_outside_the_layout_tier(
    runs: Runs, tmp_path: Path
) -> None:
    uninterrupted = runs(1, *SAVED)
    for name, plant in (("right", nullcontext), ("wrong", forget_the_optimizer)):
        folder = tmp_path / name
        shutil.copytree(uninterrupted, folder)
        # As after a crash behind step 3.
        shutil.rmtree(folder / "checkpoint" / "step-6")
        runs.workers[1].run(train, plant, folder, *SAVED)
    assert outside(uninterrupted, tmp_path / "right", "bitwise") == {}
    assert outside(uninterrupted, tmp_path / "wrong") == {"loss": 5, "grad_norm": 6}
