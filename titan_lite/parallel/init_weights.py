"""Initializes weights from the seed and the parameter's name, equal in every layout."""

from functools import partial

import torch
from torch import Tensor

from titan_lite.nn.init import CHECKPOINT_PREFIX
from titan_lite.nn.transformer import Transformer
from titan_lite.runtime.seed import derive_seed
from titan_lite.runtime.shards import own_box, to_local


@torch.no_grad()
def init_weights(
    model: Transformer, *, device: torch.device, seed: int | None, cpu_offload: bool = False
) -> None:
    """Allocates a model built on meta and initializes it, one whole parameter at a time.

    Each rank draws the whole parameter from a generator seeded by (seed, name), and keeps its
    shard. So weights are the same on 1 and on 1,024 devices of the same kind (generators of CPUs
    and GPUs differ). It needs memory for one whole parameter; experts are drawn one at a time.
    `device` draws the values; with cpu_offload, the shards are in host memory. seed: None
    for fake tensors, which have no values.
    """
    model.to_empty(device="cpu" if cpu_offload else device)

    def draw(name: str, whole: Tensor, drawn_as: str) -> Tensor:
        if seed is not None:
            generator = torch.Generator(device).manual_seed(derive_seed(seed, drawn_as))
            model.init_parameter(name, whole, generator)
        return whole

    for full_name, parameter in model.named_parameters():
        name = full_name.replace(CHECKPOINT_PREFIX, "")
        new = partial(torch.empty, dtype=parameter.dtype, device=device)
        local, part = to_local(parameter), own_box(parameter)
        if parameter.ndim == 3 and model.top_k:
            for index in range(len(local)):
                whole = draw(name, new(parameter.shape[1:]), f"{name}.{part[0].start + index}")
                local[index].copy_(whole[part[1:]])
        else:
            local.copy_(draw(name, new(parameter.shape), name)[part])
    model.init_buffers(device)
