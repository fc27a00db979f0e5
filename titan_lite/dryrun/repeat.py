"""Repeats the records of some blocks for equal blocks that do not run.

In each sequence of equal blocks, only the first two and the last two run, and only in the first two
micro-batches: the ends have different neighbours, and from the second micro-batch there may be
gradients to add to. If two blocks that should be equal differ in any allocation, nothing is
repeated. A repeated block takes and returns tensors like a real one, so everything around it
(FSDP's hooks, the pipeline, autograd) is real. It holds no tensors itself; its allocations are
freed where the real block freed them.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from titan_lite.dryrun.recorder import Allocation, Category, Moment, Recorder, Work, tensors_in

# Micro-batches in which blocks run.
MICRO_BATCHES = 2

Name = str | int
"""Name of an allocation in a pass: an argument's, GRADIENT, or a number for the block's own."""
GRADIENT = "gradient of the output"
Place = tuple[Hashable, ...]
"""Position of a pass; passes with the same place must be equal."""


class NotRepeatable(BaseException):
    """Blocks that look equal behave differently, or a block's behaviour cannot be repeated.

    A BaseException, because torch's pipelines wrap Exceptions.
    """


@dataclass(frozen=True)
class Pass:
    """The record of a real block's forward or backward.

    owners: for each tensor that outlives the pass: None for the returned one, or the number of the
    parameter whose gradient it is.
    """

    changes: list[tuple[Name, Category, int]]
    owners: dict[Name, int | None]
    makers: dict[Name, Callable[[], Tensor]] = field(compare=False)
    work: Work


def repeat_blocks(recorder: Recorder, stages: Iterable[Iterable[nn.Module]]) -> None:
    """Makes the next step run only some of the blocks. stages: blocks of each stage, in order.

    The step raises NotRepeatable if blocks cannot be repeated.
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
        """Runs the block, or repeats the pass of an equal one."""
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

        # Runs after FSDP2's hooks of the output, and before those of the input.
        assert out.grad_fn is not None
        out.grad_fn.register_prehook(start_backward)
        x.register_hook(end_backward)
        return out

    def backward_place(self) -> Place:
        """The place of backward, which is different if there are gradients to add to."""
        return *self.place, *(p.grad is not None for p in self.block.parameters())

    def repeat(self, place: Place, allocations: dict[Name, Allocation]) -> Tensor:
        """Repeats the record of a place, and makes the tensors that outlive the pass."""
        if place not in self.passes:
            raise NotRepeatable(f"no block ran for {place}")
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
        self.recorder.work += known.work
        assert returned is not None
        return returned

    def _learn(
        self,
        place: Place,
        moment: Moment,
        names: dict[Allocation, Name],
        left: Mapping[int | None, Tensor | None],
    ) -> Pass:
        """Returns the pass since `moment`, and adds its allocations to `names`.

        left: tensors that may outlive it.
        """
        recorded, work = self.recorder.since(moment)
        changes = []
        for allocation, change in recorded:
            if allocation not in names:
                if allocation in moment.live:
                    raise NotRepeatable(f"{place} frees what is not its own")
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
                raise NotRepeatable(f"{place} makes a tensor in several steps")
            owners[name], makers[name] = owner, _maker(tensor, storage.bytes)
        learned = Pass(changes, owners, makers, work)
        if self.passes.setdefault(place, learned) != learned:
            raise NotRepeatable(f"two passes differ at {place}")
        return learned

    @staticmethod
    def _check_freed(forward: Pass, backward: Pass) -> None:
        """Raises NotRepeatable if an allocation without an owner is not freed."""
        left: Counter[Name] = Counter()
        for name, _, change in (*forward.changes, *backward.changes):
            left[name] += change
        kept = {**forward.owners, **backward.owners}
        for name, size in left.items():
            if isinstance(name, int) and (size != 0) != (name in kept):
                raise NotRepeatable(f"{size} bytes of a block outlive it")


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
    """Returns a function that makes tensors like this one, which must not be a view."""
    if isinstance(tensor, DTensor):
        local = _maker(tensor.to_local(), size)
        mesh, placements = tensor.device_mesh, tensor.placements
        shape, stride = tensor.shape, tensor.stride()
        return lambda: DTensor.from_local(
            local(), mesh, placements, run_check=False, shape=shape, stride=stride
        )
    if tensor.nbytes != size:
        raise NotRepeatable("a block makes a view of something larger")
    shape, stride, dtype = tensor.shape, tensor.stride(), tensor.dtype
    return lambda: torch.empty_strided(shape, stride, dtype=dtype)
