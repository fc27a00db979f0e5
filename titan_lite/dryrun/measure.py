"""Measures one training step, of a real run or a dry run."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch.distributed as dist

from titan_lite.config.dims import ParallelDims
from titan_lite.dryrun.recorder import FLOPS, Category, PeakMemory, Recorder, tensors_in
from titan_lite.training.setup import BuiltTraining


@dataclass(frozen=True)
class Collective:
    """All equal collectives of one step. bytes: sum over their whole tensors."""

    operation: str
    axis: str
    count: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Memory and work of one rank in a step, in bytes and FLOPs.

    held: bytes between steps, by category. peak: the largest within the step.
    """

    held: dict[Category, int]
    peak: PeakMemory
    flops: int
    collectives: tuple[Collective, ...]


def recorder(dims: ParallelDims, *, fuses_float8_casts: bool = False) -> Recorder:
    """Returns a recorder that names process groups by their mesh axes."""

    @cache
    def axis_of(group: dist.ProcessGroup) -> str:
        places = [dims.coordinates(rank) for rank in dist.get_process_group_ranks(group)]
        axes = [axis for axis in dims.AXES if len({place[axis] for place in places}) > 1]
        return " x ".join(axes) or "one rank"

    return Recorder(axis_of, fuses_float8_casts=fuses_float8_casts)


def measure_step(
    built: BuiltTraining, take_step: Callable[[], object], recorder: Recorder
) -> Measured:
    """Measures `take_step` with a recorder that was entered before the model was built."""
    held: dict[Category, int] = {
        "parameters": recorder.mark(built.model.parameters(), "parameters"),
        "buffers": recorder.mark(built.model.buffers(), "buffers"),
    }
    averages = (
        built.train_step.average.tensors.values() if built.train_step.average is not None else ()
    )
    held["optimizer"] = recorder.mark(
        [*tensors_in(built.train_step.optimizer.state), *averages], "optimizer"
    )

    def mark_gradients(*_: object) -> None:
        grads = [p.grad for p in built.model.parameters() if p.grad is not None]
        held["gradients"] = recorder.mark(grads, "gradients")

    hook = built.train_step.optimizer.register_step_pre_hook(mark_gradients)
    recorder.work.clear()
    start = recorder.now()
    take_step()
    hook.remove()
    return Measured(
        held=held,
        peak=recorder.peak(start),
        flops=recorder.work[FLOPS],
        collectives=tuple(
            Collective(operation, axis, count, recorder.work["bytes", operation, axis])
            for (kind, operation, axis), count in sorted(recorder.work.items())
            if kind == "count"
        ),
    )
