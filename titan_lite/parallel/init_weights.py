"""Initializes weights from the seed and the parameter's name, equal in every layout."""

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from titan_lite.nn.init import CHECKPOINT_PREFIX
from titan_lite.nn.transformer import Transformer
from titan_lite.runtime.seed import derive_seed


@torch.no_grad()
def init_weights(
    model: Transformer, *, device: torch.device, seed: int, cpu_offload: bool = False
) -> None:
    """Allocates a model built on meta and initializes it, one whole parameter at a time.

    Each rank draws the whole parameter from a generator seeded by (seed, name), and keeps its
    shard. So weights are the same on 1 and on 1,024 devices of the same kind (generators of CPUs
    and GPUs differ). It needs memory for one whole parameter; experts are drawn one at a time.
    `device` draws the values; with cpu_offload, the shards are in host memory.
    """
    model.to_empty(device="cpu" if cpu_offload else device)
    for name, parameter in model.named_parameters():
        name = name.replace(CHECKPOINT_PREFIX, "")
        if parameter.ndim == 3 and model.top_k:
            _draw_experts(model, name, parameter, device, seed)
            continue
        generator = torch.Generator(device).manual_seed(derive_seed(seed, name))
        whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        model.init_parameter(name, whole, generator)
        if isinstance(parameter, DTensor):
            # Every rank has drawn the same values: src_data_rank=None shards without communication.
            whole = distribute_tensor(
                whole, parameter.device_mesh, parameter.placements, src_data_rank=None
            ).to_local()
            parameter.to_local().copy_(whole)
        else:
            parameter.copy_(whole)
    model.init_buffers(device)


def _draw_experts(
    model: Transformer, name: str, parameter: nn.Parameter, device: torch.device, seed: int
) -> None:
    """Draws the experts of which this rank has a part, each from its own generator."""
    box, local = [(0, size) for size in parameter.shape], parameter.data
    if isinstance(parameter, DTensor):
        box, local = _local_box(parameter), parameter.to_local()
    for index in range(len(local)):
        generator = torch.Generator(device).manual_seed(
            derive_seed(seed, f"{name}.{box[0][0] + index}")
        )
        whole = torch.empty(parameter.shape[1:], dtype=parameter.dtype, device=device)
        model.init_parameter(name, whole, generator)
        for dim, (offset, size) in enumerate(box[1:]):
            whole = whole.narrow(dim, offset, size)
        local[index].copy_(whole)


def _local_box(parameter: DTensor) -> list[tuple[int, int]]:
    """Returns offset and size of this rank's part in each dimension.

    torch computes them with tensors, which have no values in a dry run.
    """
    box = [(0, size) for size in parameter.shape]
    mesh, placements = parameter.device_mesh, parameter.placements
    # A strided placement splits after the later axes have split.
    axes = sorted(range(mesh.ndim), key=lambda axis: hasattr(placements[axis], "split_factor"))
    for axis in axes:
        placement = placements[axis]
        if not placement.is_replicate():
            offset, size = box[placement.dim]  # type: ignore[attr-defined]
            step = -(-size // mesh.size(axis))
            start = min(mesh.get_local_rank(axis) * step, size)
            box[placement.dim] = offset + start, min(step, size - start)  # type: ignore[attr-defined]
    return box
