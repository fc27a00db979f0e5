"""Collectives that are private in torch, or whose names differ between its versions."""

import torch.distributed as dist
from torch.distributed._functional_collectives import (
    AsyncCollectiveTensor,
    all_gather_tensor_autograd,
    all_to_all_single_autograd,
)
from torch.distributed._functional_collectives import all_reduce as traceable_all_reduce
from torch.distributed.distributed_c10d import _resolve_process_group as group_by_name

__all__ = [
    "AsyncCollectiveTensor",
    "all_gather_single",
    "all_gather_tensor_autograd",
    "all_to_all_single_autograd",
    "group_by_name",
    "reduce_scatter_single",
    "traceable_all_reduce",
]

# torch 2.13 renamed both.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
