"""Private names of torch that only a dry run needs.

A fake tensor has a shape, a dtype and the size of a storage, but no memory. A fake process group
returns from every collective at once, and receives nothing.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from titan_lite.parallel.attention_ops import (
    CPU_FLASH,
    CPU_FLASH_BACKWARD,
    FLASH,
    FLASH_BACKWARD,
)
from titan_lite.parallel.context_attention import sharded_attention, sharded_attention_backward
from titan_lite.runtime.collectives import group_by_name

__all__ = ["FakeTensor", "TorchDispatchMode"]

aten = torch.ops.aten

# Our operators that communicate, with the functions that implement them.
BODIES: dict[Any, Callable[..., Any]] = {
    operator._opoverload: operator._init_fn
    for operator in (sharded_attention, sharded_attention_backward)
}
# torch has no FLOP formulas for the CPU's fused attention: use those of the GPU's.
SAME_FLOPS = {
    CPU_FLASH: FLASH,
    CPU_FLASH_BACKWARD: FLASH_BACKWARD,
    aten.addmm_: aten.addmm,
}
# Position of the query in the arguments of fused attention; key and value follow.
QUERY = {FLASH: 0, FLASH_BACKWARD: 1}


class DryMode(FakeTensorMode):
    """Fake tensors, whose flags are true and whose numbers are 1 if the host reads them.

    Most optimizers read the flag whether a step is applied, and the number of steps. Integers stay
    unknown, because they may be sizes.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            return super().__torch_dispatch__(func, types, args, kwargs or {})
        except DataDependentOutputException:
            if args[0].dtype == torch.bool or args[0].is_floating_point():
                return 1
            raise


def flops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Multiplications and additions of an operation, by torch's formulas; 0 if it has none."""
    packet = SAME_FLOPS.get(func._overloadpacket, func._overloadpacket)
    formula = flop_registry.get(packet)
    if formula is None:
        return 0
    if packet in QUERY:
        # torch 2.11's formulas require as many key heads as query heads.
        at = QUERY[packet]
        query, key, value = (list(tensor.shape) for tensor in args[at : at + 3])
        key[1] = value[1] = query[1]
        args = (*args[:at], query, key, value, *args[at + 3 :])
    return int(formula(*args, **kwargs, out_val=out))


def group_of(func: Any, args: Any) -> dist.ProcessGroup:
    """Returns the process group of a collective, from the dispatcher's arguments."""
    if func.namespace == "c10d":
        boxed = next(arg for arg in args if isinstance(arg, torch.ScriptObject))
        return dist.ProcessGroup.unbox(boxed)
    name = [arg for arg in args if isinstance(arg, str)][-1]
    return group_by_name(name)  # type: ignore[arg-type]


@contextlib.contextmanager
def fake_world(rank: int, world_size: int) -> Iterator[None]:
    """Makes this process one rank of a world without any other process."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def resizes_seen(see: Callable[[torch.UntypedStorage], None]) -> Iterator[None]:
    """Calls `see` after every resize of a storage, with which FSDP2 frees gathered weights."""
    resize = torch.UntypedStorage.resize_

    def resize_and_tell(storage: Any, size: int) -> Any:
        result = resize(storage, size)
        see(storage)
        return result

    torch.UntypedStorage.resize_ = resize_and_tell  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]
