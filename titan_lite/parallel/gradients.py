"""The norm of the global gradient, and the divisor that clips it."""

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement

from titan_lite.runtime.shards import to_local

# torch's CPU norm in float32 has an error that depends on the sharding: 5e-6 for 2048 x 64
# elements. Chunks of this size are as fast in float64.
CPU_CHUNK = 65_536


@dataclass(frozen=True)
class GradNorm:
    """The 2-norm of the global gradient, before clipping, and the norms of this rank's parts.

    total: scalar, the same on all ranks. parts: (P,), owners: P names of parameters. divisor:
    scalar that the optimizer divides gradients by; None if it does not.
    """

    total: Tensor
    parts: Tensor
    owners: list[str]
    divisor: Tensor | None = None


@torch.no_grad()
def clipped_norm(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    max_norm: float,
    *,
    loss_scale: Tensor | None = None,
    pp_group: dist.ProcessGroup | None = None,
    tied: nn.Parameter | None = None,
) -> GradNorm:
    """Returns the norm of the gradient over all ranks, and the divisor that clips it to max_norm.

    The gradients do not change: a fused optimizer divides them while it reads them, which saves a
    pass over memory.

    max_norm: 0 does not clip. loss_scale: factor by which the gradients are too large.
    pp_group: the ranks that have the other pipeline stages' parameters. tied: the last stage's
    copy of a tied embedding, whose gradient only the first stage counts.
    """
    grads = {name: p.grad for name, p in named_parameters if p.grad is not None and p is not tied}
    norm = global_norm(grads, pp_group)
    total, divisor = norm.total, loss_scale
    if loss_scale is not None:
        total = total / loss_scale
    if max_norm > 0:
        # The same formula as in torch.nn.utils.clip_grads_with_norm_.
        excess = ((total + 1e-6) / max_norm).clamp(min=1.0)
        divisor = excess if loss_scale is None else excess * loss_scale
    return dataclasses.replace(norm, total=total, divisor=divisor)


def global_norm(grads: Mapping[str, Tensor], pp_group: dist.ProcessGroup | None = None) -> GradNorm:
    """Returns the 2-norm of all gradients; each element counts once, whatever its placements.

    One all-reduce of a scalar per distinct (mesh, placements) and sharded axis.
    """
    local_shards: dict[tuple[DeviceMesh, tuple[Placement, ...]] | None, list[tuple[str, Tensor]]]
    local_shards = defaultdict(list)
    for name, grad in grads.items():
        layout = (grad.device_mesh, grad.placements) if isinstance(grad, DTensor) else None
        local_shards[layout] += [(name, chunk) for chunk in _chunks(to_local(grad))]
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
                # Shards add up to the sum of squares; replicas have the same sum.
                if not placement.is_replicate():
                    dist.all_reduce(square, group=mesh.get_group(axis))
        squares.append(square)
    total = torch.stack(squares).sum()
    if pp_group is not None:
        dist.all_reduce(total, group=pp_group)
    owners = [name for shards in local_shards.values() for name, _ in shards]
    return GradNorm(total.sqrt().float(), torch.cat(parts), owners)


def _chunks(tensor: Tensor) -> Sequence[Tensor]:
    # torch 2.11 cannot split fake tensors without elements.
    if tensor.device.type != "cpu" or not tensor.numel():
        return (tensor,)
    return tensor.flatten().split(CPU_CHUNK)
