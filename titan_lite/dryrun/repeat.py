"""Equal blocks of a model: some are run, and what the recorder saw of them is repeated for others.

Of each row of equal blocks the first two and the last two run, in the first two micro-batches: the
ends of a row have other neighbours, and from the second micro-batch on there may be gradients to
add to. Blocks between the ends must have done the same, allocation by allocation; otherwise nothing
is repeated. A block that is repeated takes and returns tensors like any other, so that everything
around it (FSDP's hooks, the pipeline, autograd) is real. It holds none: what the block that ran
holds is known from when that frees it.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from titan_lite.dryrun.recorder import Allocation, Category, Moment, Recorder, tensors_in

# Micro-batches in which blocks run.
MICRO_BATCHES = 2

Name = str | int
"""Of an allocation in a pass: an argument's, GRADIENT, or a number for one of the block's own."""
GRADIENT = "gradient of the output"
Place = tuple[Hashable, ...]
"""Passes at the same place must be the same."""


class NotRepeatableError(BaseException):
    """Blocks that look equal do different things, or what one does cannot be repeated.

    Not an Exception: torch's pipelines wrap those.
    """


@dataclass(frozen=True)
class Pass:
    """Forward or backward of a block that ran.

    owners: of the tensors that it leaves: None of the one returned, or the number of the parameter
    whose gradient it is.
    """

    changes: list[tuple[Name, Category, int]]
    owners: dict[Name, int | None]
    makers: dict[Name, Callable[[], Tensor]] = field(compare=False)
    flops: int
    counts: Counter[tuple[str, str]]
    bytes: Counter[tuple[str, str]]


def repeat_blocks(recorder: Recorder, stages: Iterable[Iterable[nn.Module]]) -> None:
    """Runs a few of the blocks in the next step; stages: the blocks of each, in order.

    The step raises NotRepeatableError where these do not stand for all.
    """
    passes: dict[Place, Pass] = {}
    rows = itertools.count()
    for blocks in stages:
        for _, equal in itertools.groupby(blocks, _structure):
            row, number = list(equal), next(rows)
            last = len(row) - 1
            for index, block in enumerate(row):
                place = (number, index if index in (0, last) else None)
                repeater = _Repeater(recorder, passes, block, place)
                repeater.runs_left = MICRO_BATCHES if index in (0, 1, last - 1, last) else 0
                block.forward = repeater.forward


def _structure(block: nn.Module) -> list[Any]:
    """Modules, settings and parameters of a block."""
    modules = [
        (name, type(module), [item for item in vars(module).items() if _is_setting(item[1])])
        for name, module in block.named_modules()
    ]
    parameters = [
        (name, p.shape, p.dtype, p.placements if isinstance(p, DTensor) else None)
        for name, p in block.named_parameters()
    ]
    return [modules, parameters]


def _is_setting(value: object) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


class _Repeater:
    """Replaces a block's forward."""

    runs_left: int

    def __init__(
        self, recorder: Recorder, passes: dict[Place, Pass], block: nn.Module, place: Place
    ) -> None:
        self.recorder, self.passes, self.block, self.place = recorder, passes, block, place
        self._forward = block.forward

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Runs the block, or repeats another's pass."""
        allocations: dict[Name, Allocation] = {
            f"input {index}": self.recorder.allocation(tensor)
            for index, tensor in enumerate(tensors_in((x, args, kwargs)))
        }
        if self.runs_left == 0:
            repeated: Tensor = _Repeated.apply(x, self, allocations)
            return repeated
        self.runs_left -= 1
        names = {allocation: name for name, allocation in allocations.items()}
        moment = self.recorder.moment()
        out = self._forward(x, *args, **kwargs)
        forward = self._learn(self.place, moment, names, {None: out})
        place = self.place

        def start_backward(grads: Sequence[Tensor]) -> None:
            nonlocal moment, place
            names.setdefault(self.recorder.allocation(grads[0]), GRADIENT)
            moment, place = self.recorder.moment(), self.backward_place()

        def end_backward(grad: Tensor) -> None:
            left: dict[int | None, Tensor | None] = {None: grad}
            left |= {index: p.grad for index, p in enumerate(self.block.parameters())}
            backward = self._learn(place, moment, names, left)
            self._check_freed(forward, backward)

        # After FSDP2's hooks of the output, and before those of the input.
        assert out.grad_fn is not None
        out.grad_fn.register_prehook(start_backward)
        x.register_hook(end_backward)
        return out

    def backward_place(self) -> Place:
        """Adding to gradients that are there is another place."""
        return *self.place, *(p.grad is not None for p in self.block.parameters())

    def repeat(self, place: Place, allocations: dict[Name, Allocation]) -> Tensor:
        """Records the changes of the pass learned at a place; makes the tensors that it leaves."""
        if place not in self.passes:
            raise NotRepeatableError(f"no block ran for {place}")
        known = self.passes[place]
        parameters = list(self.block.parameters())
        returned: Tensor | None = None
        for name, category, change in known.changes:
            if name in known.owners:
                tensor, owner = known.makers[name](), known.owners[name]
                if owner is None:
                    returned = tensor
                else:
                    parameters[owner].grad = tensor
            elif isinstance(name, str):
                self.recorder.free_now(allocations[name])
            else:
                own = allocations.setdefault(name, Allocation(0, category))
                self.recorder.change(own, change)
        self.recorder.add(known.flops, known.counts, known.bytes)
        assert returned is not None
        return returned

    def _learn(
        self,
        place: Place,
        moment: Moment,
        names: dict[Allocation, Name],
        left: Mapping[int | None, Tensor | None],
    ) -> Pass:
        """The pass since `moment`; left: tensors that it may have made. New names join `names`."""
        recorded = self.recorder.since(moment)
        changes = []
        for allocation, change in recorded.changes:
            if allocation not in names:
                if allocation in moment.live:
                    raise NotRepeatableError(f"{place} frees what is not its own")
                names[allocation] = len(names)
            changes.append((names[allocation], allocation.category, change))
        owners: dict[Name, int | None] = {}
        makers: dict[Name, Callable[[], Tensor]] = {}
        for owner, tensor in left.items():
            if tensor is None:
                continue
            storage = self.recorder.allocation(tensor)
            if storage in moment.live:
                continue
            name = names[storage]
            if name in owners or [n for n, _, _ in changes].count(name) != 1:
                raise NotRepeatableError(f"{place} makes a tensor in several steps")
            owners[name], makers[name] = owner, _maker(tensor, storage.bytes)
        learned = Pass(changes, owners, makers, recorded.flops, recorded.counts, recorded.bytes)
        if self.passes.setdefault(place, learned) != learned:
            raise NotRepeatableError(f"two passes differ at {place}")
        return learned

    @staticmethod
    def _check_freed(forward: Pass, backward: Pass) -> None:
        """Nothing may be left but tensors that have owners."""
        left: Counter[Name] = Counter()
        for name, _, change in (*forward.changes, *backward.changes):
            left[name] += change
        kept = {**forward.owners, **backward.owners}
        for name, size in left.items():
            if isinstance(name, int) and (size != 0) != (name in kept):
                raise NotRepeatableError(f"{size} bytes of a block outlive it")


class _Repeated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, repeater: _Repeater, allocations: dict[Name, Allocation]
    ) -> Tensor:
        ctx.repeater, ctx.allocations = repeater, allocations
        return repeater.repeat(repeater.place, allocations)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        repeater: _Repeater = ctx.repeater
        ctx.allocations[GRADIENT] = repeater.recorder.allocation(grads[0])
        return repeater.repeat(repeater.backward_place(), ctx.allocations), None, None


def _maker(tensor: Tensor, size: int) -> Callable[[], Tensor]:
    """Makes tensors like one that has a storage of this size to itself."""
    if isinstance(tensor, DTensor):
        local = _maker(tensor.to_local(), size)
        mesh, placements = tensor.device_mesh, tensor.placements
        shape, stride = tensor.shape, tensor.stride()
        return lambda: DTensor.from_local(
            local(), mesh, placements, run_check=False, shape=shape, stride=stride
        )
    if tensor.nbytes != size:
        raise NotRepeatableError("a block makes a view of something larger")
    shape, stride, dtype = tensor.shape, tensor.stride(), tensor.dtype
    return lambda: torch.empty_strided(shape, stride, dtype=dtype)
