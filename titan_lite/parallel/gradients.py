"""The norm of the global gradient, and clipping by it."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement

# torch's CPU norm adds up one float32 per lane: 16 Mi elements at once are off by 7e-4, which
# another sharding would change; 64 Ki are off by less than 1e-6.
CPU_CHUNK = 65_536


@torch.no_grad()
def clip_grad_norm(
    parameters: Iterable[nn.Parameter],
    max_norm: float,
    *,
    loss_scale: Tensor | None = None,
    pp_group: dist.ProcessGroup | None = None,
    copy: nn.Parameter | None = None,
) -> Tensor:
    """Returns the 2-norm of the gradient over all ranks, and clips to max_norm unless that is 0.

    loss_scale: what the gradients are too large by; they are divided by it first.
    pp_group: the ranks that have the other pipeline stages' parameters.
    copy: the one of them that another stage has as well, and counts.
    """
    parameters = [p for p in parameters if p.grad is not None]
    grads = [p.grad for p in parameters if p.grad is not None]
    if loss_scale is not None:
        torch._foreach_div_(grads, loss_scale)
    counted = [p.grad for p in parameters if p.grad is not None and p is not copy]
    norm = global_norm(counted, pp_group)
    if max_norm > 0:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def global_norm(grads: Sequence[Tensor], pp_group: dist.ProcessGroup | None = None) -> Tensor:
    """2-norm of all gradients together, each element counted once whatever its placements.

    One all-reduce of a scalar per distinct (mesh, placements) and sharded axis.
    """
    local_shards: dict[tuple[DeviceMesh, tuple[Placement, ...]] | None, list[Tensor]]
    local_shards = defaultdict(list)
    for grad in grads:
        if isinstance(grad, DTensor):
            local_shards[grad.device_mesh, grad.placements] += _chunks(grad.to_local())
        else:
            local_shards[None] += _chunks(grad)
    squares = []
    for layout, chunks in local_shards.items():
        square = nn.utils.get_total_norm(chunks).square()
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
    return total.sqrt()


def _chunks(tensor: Tensor) -> Sequence[Tensor]:
    return tensor.flatten().split(CPU_CHUNK) if tensor.device.type == "cpu" else (tensor,)
