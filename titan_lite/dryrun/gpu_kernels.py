"""GPU kernels that allocate other tensors than the CPU's, for fake tensors."""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial

from titan_lite.nn import norm
from titan_lite.parallel import gradients


@contextlib.contextmanager
def gpu_kernels() -> Iterator[None]:
    """Uses fused RMSNorm, which stores no float32 intermediates, and norms of whole gradients."""
    of_cpu, chunk = norm.rms_norm, gradients.CPU_CHUNK
    norm.rms_norm, gradients.CPU_CHUNK = _rms_norm, sys.maxsize  # type: ignore[assignment]
    try:
        yield
    finally:
        norm.rms_norm, gradients.CPU_CHUNK = of_cpu, chunk


def _rms_norm(
    x: Tensor,
    _shape: Sequence[int],
    weight: Tensor | None = None,
    _eps: float | None = None,
) -> Tensor:
    assert weight is not None
    if not isinstance(x, DTensor):
        out: Tensor = FusedRMSNorm.apply(x, weight)
        return out
    assert isinstance(weight, DTensor)
    # Each rank has a partial gradient of the weight, from its tokens.
    part = [Partial() if placement.is_shard() else placement for placement in x.placements]
    local = FusedRMSNorm.apply(x.to_local(), weight.to_local(grad_placements=part))
    return DTensor.from_local(local, x.device_mesh, x.placements, run_check=False)


class FusedRMSNorm(torch.autograd.Function):
    """Allocations of aten._fused_rms_norm and its backward; they compute nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        rstd = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
        ctx.save_for_backward(x, weight, rstd)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)
