"""Weights that depend on the seed and the parameter's name, and on no layout."""

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from titan_lite.nn.init import CHECKPOINT_PREFIX
from titan_lite.nn.transformer import Transformer
from titan_lite.runtime.seed import derive_seed


@torch.no_grad()
def init_weights(
    model: Transformer, *, device: torch.device, seed: int, cpu_offload: bool = False
) -> None:
    """Allocates a model built on meta and fills it, one whole parameter at a time.

    Each parameter is drawn whole from its own generator, seeded by (seed, name), and the local
    shard kept: the same weights on 1 device or 1,024 of a kind (generators of different kinds of
    device differ), at the peak cost of one whole parameter.
    `device` draws the values; with cpu_offload the shards live in host memory.
    """
    model.to_empty(device="cpu" if cpu_offload else device)
    for name, parameter in model.named_parameters():
        name = name.replace(CHECKPOINT_PREFIX, "")
        generator = torch.Generator(device).manual_seed(derive_seed(seed, name))
        whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        model.init_parameter(name, whole, generator)
        if isinstance(parameter, DTensor):
            # Every rank has drawn the same values: src_data_rank=None cuts without sending.
            whole = distribute_tensor(
                whole, parameter.device_mesh, parameter.placements, src_data_rank=None
            ).to_local()
            parameter.to_local().copy_(whole)
        else:
            parameter.copy_(whole)
    model.init_buffers(device)
