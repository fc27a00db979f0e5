"""Records the allocations, FLOPs and collectives of one process, operation by operation.

It works below DTensor, so sizes and FLOPs are this rank's, with real and with fake tensors and
process groups.
"""

import contextlib
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves

from titan_lite.dryrun.torch_private import (
    BODIES,
    FakeTensor,
    TorchDispatchMode,
    flops,
    group_of,
    resizes_seen,
)
from titan_lite.runtime.shards import to_local

Category = Literal[
    "parameters", "gradients", "optimizer", "activations", "unsharded", "logits", "buffers"
]
CATEGORIES: tuple[Category, ...] = get_args(Category)
# Category of an allocation by the innermost of these source files on the stack.
ALLOCATORS: tuple[tuple[str, Category], ...] = (
    ("/torch/distributed/fsdp/", "unsharded"),
    ("/titan_lite/training/loss.py", "logits"),
    ("/torch/optim/", "optimizer"),
    ("/titan_lite/optim/", "optimizer"),
)
# The file in which DTensor runs operations on global shapes, only to get the result's shape.
SHARDING_PROPAGATION = "/torch/distributed/tensor/_sharding_prop.py"
# Files whose operations the compiler fuses to one kernel, with only the float8 tensor as a result.
FLOAT8_CASTS = ("/torchao/float8/float8_training_tensor.py", "/torchao/float8/float8_utils.py")
# Collectives by a part of their operator's name, in torch.distributed and in functional form.
OPERATIONS = {
    "all-gather": ("allgather", "all_gather"),
    "reduce-scatter": ("reduce_scatter",),
    "all-reduce": ("allreduce", "all_reduce"),
    "all-to-all": ("alltoall", "all_to_all"),
    "broadcast": ("broadcast",),
    "send": ("send",),
    "receive": ("recv",),
}


Work = Counter[tuple[Literal["FLOPs", "count", "bytes"], str, str]]
"""FLOPs, and number and bytes of the collectives of each (operation, axis)."""
FLOPS: tuple[Literal["FLOPs"], str, str] = ("FLOPs", "", "")


@dataclass(eq=False, slots=True)
class Allocation:
    """One storage: its current bytes, and its category, which may be set later.

    freed: number of the change that frees it.
    """

    bytes: int
    category: Category
    freed: int | None = None


@dataclass(frozen=True)
class PeakMemory:
    """The largest number of bytes that are allocated at once, by category."""

    bytes: int
    categories: dict[Category, int]


@dataclass(frozen=True)
class Moment:
    """State of a recorder at one time. live: allocations that are not freed."""

    live: frozenset[Allocation]
    num_changes: int
    work: Work


class Recorder(TorchDispatchMode):
    """Records while it is entered.

    work: FLOPs of matmuls and attention, and collectives, with the bytes of whole tensors: an
    all-gather's output, a reduce-scatter's input. fuses_float8_casts: leaves out the float32 copies
    of casts to float8, which compiled casts do not make.
    """

    def __init__(
        self, axis_of: Callable[[dist.ProcessGroup], str], *, fuses_float8_casts: bool = False
    ) -> None:
        super().__init__()
        self._fuses_float8_casts = fuses_float8_casts
        self.work: Work = Counter()
        self._axis_of = axis_of
        self._live: dict[int, Allocation] = {}
        # Every change of an allocation's size, in order.
        self._changes: list[tuple[Allocation, int]] = []
        self._references: dict[int, Any] = {}
        # One for each time that it is entered, because __torch_dispatch__ enters it again.
        self._stacks: list[contextlib.ExitStack] = []

    def __enter__(self) -> "Recorder":
        self._stacks.append(contextlib.ExitStack())
        self._stacks[-1].enter_context(resizes_seen(self._resized))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._stacks.pop().close()
        super().__exit__(*error)

    def now(self) -> int:
        """The current time, for `peak`."""
        return len(self._changes)

    def moment(self) -> Moment:
        """The current state, for `since`."""
        live = frozenset(self._live.values())
        return Moment(live, self.now(), self.work.copy())

    def since(self, moment: Moment) -> tuple[list[tuple[Allocation, int]], Work]:
        """The changes of allocations and the work since a moment."""
        return self._changes[moment.num_changes :], self.work - moment.work

    def allocation(self, tensor: Tensor) -> Allocation:
        """The allocation of a tensor's storage, or of a DTensor's local tensor."""
        return self._see(next(_parts(tensor)).untyped_storage())

    def change(self, allocation: Allocation, change: int) -> None:
        """Records a simulated change of an allocation."""
        self._changes.append((allocation, change))

    def free_now(self, allocation: Allocation) -> None:
        """Records that an allocation is freed now, independent of its tensors."""
        if allocation.freed is not None:
            self._changes[allocation.freed] = (allocation, 0)
        self._free(allocation)

    def peak(self, start: int = 0, end: int | None = None) -> PeakMemory:
        """Returns the peak between two times."""
        held: dict[Category, int] = dict.fromkeys(CATEGORIES, 0)
        total = most = 0
        at_most: dict[Category, int] = {}
        for number, (allocation, change) in enumerate(self._changes[:end]):
            held[allocation.category] += change
            total += change
            if number >= start - 1 and total > most:
                most, at_most = total, dict(held)
        return PeakMemory(most, at_most)

    def mark(self, tensors: Iterable[Tensor], category: Category) -> int:
        """Assigns a category to tensors, whenever they were allocated; returns their bytes."""
        allocations = set()
        for tensor in tensors:
            for part in _parts(tensor):
                allocation = self._see(part.untyped_storage())
                allocation.category = category
                allocations.add(allocation)
        return sum(allocation.bytes for allocation in allocations)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not all(kind in (Tensor, FakeTensor) for kind in types):
            return NotImplemented  # A DTensor, for example, comes back as its local tensor.
        if _is_called_by(SHARDING_PROPAGATION):
            return func(*args, **kwargs)
        if func in BODIES:
            with self:
                return BODIES[func](*args, **kwargs)
        out = func(*args, **kwargs)
        if func.namespace in ("c10d", "_c10d_functional", "titan_lite"):
            self._count_collective(func, args, out)
        if func.namespace == "fsdp" and "chunk_cat" in func.__name__:
            # FSDP2 reduces the gradients of gathered weights.
            self._name_gradients(args)
        self.work[FLOPS] += flops(func, args, kwargs, out)
        for tensor in tensors_in(out):
            if tensor.device.type != "meta" and not self._is_inside_a_kernel(tensor):
                self._see(tensor.untyped_storage())
        return out

    def _is_inside_a_kernel(self, tensor: Tensor) -> bool:
        is_float8 = tensor.element_size() == 1
        return self._fuses_float8_casts and not is_float8 and _is_called_by(*FLOAT8_CASTS)

    def _see(self, storage: torch.UntypedStorage) -> Allocation:
        key = storage._cdata
        if key in self._live:
            return self._live[key]
        allocation = self._live[key] = Allocation(storage.nbytes(), _category())
        self._changes.append((allocation, allocation.bytes))

        def freed(_: Any) -> None:
            del self._live[key], self._references[key]
            if allocation.freed is None:
                self._free(allocation)

        self._references[key] = weakref.ref(storage, freed)
        return allocation

    def _free(self, allocation: Allocation) -> None:
        allocation.freed = self.now()
        self._changes.append((allocation, -allocation.bytes))

    def _resized(self, storage: torch.UntypedStorage) -> None:
        allocation, size = self._live.get(storage._cdata), storage.nbytes()
        if allocation is not None and size != allocation.bytes:
            self._changes.append((allocation, size - allocation.bytes))
            allocation.bytes = size

    def _name_gradients(self, args: Any) -> None:
        for tensor in tensors_in(args):
            allocation = self._see(tensor.untyped_storage())
            if allocation.category == "activations":
                allocation.category = "unsharded"

    def _count_collective(self, func: Any, args: Any, out: Any) -> None:
        name = func.__name__
        for operation, words in OPERATIONS.items():
            if any(word in name for word in words):
                axis = self._axis_of(group_of(func, args))
                self.work["count", operation, axis] += 1
                self.work["bytes", operation, axis] += max(
                    sum(t.nbytes for t in tensors_in(value)) for value in (*args, out)
                )
                return


def tensors_in(values: Any) -> Iterator[Tensor]:
    """Yields the tensors in nested containers."""
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """Yields the plain tensors inside a DTensor or a tensor of torchao."""
    local = to_local(tensor)
    if hasattr(local, "__tensor_flatten__"):
        yield from (part for part in vars(local).values() if isinstance(part, Tensor))
    else:
        yield local


def _category() -> Category:
    return next(
        (category for name in _callers() for part, category in ALLOCATORS if part in name),
        "activations",
    )


def _is_called_by(*files: str) -> bool:
    return any(name.endswith(files) for name in _callers())


def _callers() -> Iterator[str]:
    """The source files of the functions on the stack, innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame.f_code.co_filename
        frame = frame.f_back
