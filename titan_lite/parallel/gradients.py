"""The norm of the global gradient, and the clipping that follows from it."""

import dataclasses
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

    total: scalar, the same on all ranks. parts: (P,), owners: P names of parameters. grad_scale:
    scalar that the optimizer divides gradients by, None where it takes them as they are.
    """

    total: Tensor
    parts: Tensor
    owners: list[str]
    grad_scale: Tensor | None = None


@torch.no_grad()
def clipped_norm(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    max_norm: float,
    *,
    loss_scale: Tensor | None = None,
    pp_group: dist.ProcessGroup | None = None,
    copy: nn.Parameter | None = None,
) -> GradNorm:
    """Returns the norm of the gradient over all ranks, and the scale that clips it to max_norm.

    The gradients themselves stay as they are: a fused optimizer reads the scale with them, which
    saves a pass over memory. max_norm: 0 does not clip.
    loss_scale: what the gradients are too large by.
    pp_group: the ranks that have the other pipeline stages' parameters.
    copy: the one of them that another stage has as well, and counts.
    """
    grads = {name: p.grad for name, p in named_parameters if p.grad is not None and p is not copy}
    norm = global_norm(grads, pp_group)
    total, grad_scale = norm.total, loss_scale
    if loss_scale is not None:
        total = total / loss_scale
    if max_norm > 0:
        # As torch.nn.utils.clip_grads_with_norm_.
        excess = ((total + 1e-6) / max_norm).clamp(min=1.0)
        grad_scale = excess if loss_scale is None else excess * loss_scale
    return dataclasses.replace(norm, total=total, grad_scale=grad_scale)


def global_norm(grads: Mapping[str, Tensor], pp_group: dist.ProcessGroup | None = None) -> GradNorm:
    """Returns the 2-norm of all gradients; each element counts once, whatever its placements.

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
