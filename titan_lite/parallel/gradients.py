"""The norm of the global gradient, and clipping by it."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement

# torch's CPU norm adds up one number per lane: in float32 with an error that depends on the
# sharding, 5e-6 of 2048 x 64 elements. In float64, of a copy, this many at once take no longer.
CPU_CHUNK = 65_536


@dataclass(frozen=True)
class GradNorm:
    """The 2-norm of the global gradient, before clipping, and of the parts that this rank has.

    total: scalar, the same on all ranks. parts: (P,), owners: P names of parameters.
    """

    total: Tensor
    parts: Tensor
    owners: list[str]


@torch.no_grad()
def clip_grad_norm(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    max_norm: float,
    *,
    loss_scale: Tensor | None = None,
    pp_group: dist.ProcessGroup | None = None,
    copy: nn.Parameter | None = None,
) -> GradNorm:
    """Returns the norm of the gradient over all ranks, and clips to max_norm unless that is 0.

    loss_scale: what the gradients are too large by; they are divided by it first.
    pp_group: the ranks that have the other pipeline stages' parameters.
    copy: the one of them that another stage has as well, and counts.
    """
    named = {name: p for name, p in named_parameters if p.grad is not None}
    if loss_scale is not None:
        torch._foreach_div_([p.grad for p in named.values() if p.grad is not None], loss_scale)
    counted = {n: p.grad for n, p in named.items() if p.grad is not None and p is not copy}
    norm = global_norm(counted, pp_group)
    if max_norm > 0:
        nn.utils.clip_grads_with_norm_(named.values(), max_norm, norm.total)
    return norm


def global_norm(grads: Mapping[str, Tensor], pp_group: dist.ProcessGroup | None = None) -> GradNorm:
    """2-norm of all gradients together, each element counted once whatever its placements.

    One all-reduce of a scalar per distinct (mesh, placements) and sharded axis.
    """
    local_shards: dict[tuple[DeviceMesh, tuple[Placement, ...]] | None, list[tuple[str, Tensor]]]
    local_shards = defaultdict(list)
    for name, grad in grads.items():
        layout = (grad.device_mesh, grad.placements) if isinstance(grad, DTensor) else None
        local = grad.to_local() if isinstance(grad, DTensor) else grad
        local_shards[layout] += [(name, chunk) for chunk in _chunks(local)]
    squares, parts = [], []
    for layout, shards in local_shards.items():
        chunks = [chunk for _, chunk in shards]
        dtype = torch.float64 if chunks[0].device.type == "cpu" else None
        norms = torch.stack(torch._foreach_norm(chunks, dtype=dtype))
        parts.append(norms)
        square = torch.linalg.vector_norm(norms).square()
        if layout is not None:
            mesh, placements = layout
            for axis, placement in enumerate(placements):
                assert not placement.is_partial(), placements
                # A shard adds its part of the sum of squares; replicas hold the same one.
                if not placement.is_replicate():
                    dist.all_reduce(square, group=mesh.get_group(axis))
        squares.append(square)
    total = torch.stack(squares).sum()
    if pp_group is not None:
        dist.all_reduce(total, group=pp_group)
    owners = [name for shards in local_shards.values() for name, _ in shards]
    return GradNorm(total.sqrt().float(), torch.cat(parts), owners)


def _chunks(tensor: Tensor) -> Sequence[Tensor]:
    return tensor.flatten().split(CPU_CHUNK) if tensor.device.type == "cpu" else (tensor,)
