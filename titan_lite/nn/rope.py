"""Rotary position embedding in Hugging Face's rotate-half convention.

Shape suffixes: B batch, S sequence, N query heads, K key heads, H head dim, R features of a head
that are rotated, F = R / 2 rotary frequencies.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from titan_lite.models.args import DecoderArgs, RopeScaling


class NoRotation(nn.Module):
    """A no-op, for learned positions."""

    def forward(
        self, q_BSNH: Tensor, k_BSKH: Tensor, positions_S: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return q_BSNH, k_BSKH


class RotaryEmbedding(nn.Module):
    """Rotates queries and keys by their position; one instance is shared by all blocks.

    The first `rotary_dim` features of each head are rotated, the others do not change.

    The tables are buffers of this shared module, not arguments of the block, because FSDP2 casts a
    block's floating-point arguments to param_dtype, and angles need float32. They are shared,
    because 131,072 positions take 128 MiB, and non-persistent, because they can be recomputed.
    """

    cos_SR: Tensor
    sin_SR: Tensor

    def __init__(self, args: DecoderArgs) -> None:
        super().__init__()
        self.rotary_dim = args.rotary_dim
        self.max_seq_len = args.max_seq_len
        self.theta = args.rope_theta
        self.scaling = args.rope_scaling
        self.init_buffers(None)

    def init_buffers(self, device: torch.device | str | None) -> None:
        """Computes the tables on `device`; must be called again after a meta build."""
        exponent_F = torch.arange(0, self.rotary_dim, 2, device=device).float() / self.rotary_dim
        frequency_F = 1.0 / self.theta**exponent_F
        if self.scaling is not None:
            frequency_F = _scale(frequency_F, self.scaling)
        position_S = torch.arange(self.max_seq_len, device=device).float()
        angle_SF = torch.outer(position_S, frequency_F)
        cos_SF, sin_SF = angle_SF.cos(), angle_SF.sin()
        self.register_buffer("cos_SR", torch.cat((cos_SF, cos_SF), dim=1), persistent=False)
        self.register_buffer("sin_SR", torch.cat((-sin_SF, sin_SF), dim=1), persistent=False)

    def forward(
        self, q_BSNH: Tensor, k_BSKH: Tensor, positions_S: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Rotates in float32; returns the dtype and shapes of the inputs.

        positions_S: position ids; (B, S) if rows differ; None: 0 to S - 1.
        """
        rows = slice(q_BSNH.shape[1]) if positions_S is None else positions_S
        # Queries and keys together need half as many kernels.
        heads = torch.cat((q_BSNH, k_BSKH), dim=2)
        rotated = _Rotation.apply(heads, self.cos_SR[rows, None], self.sin_SR[rows, None])
        q_BSNH, k_BSKH = rotated.split((q_BSNH.shape[2], k_BSKH.shape[2]), dim=2)
        return q_BSNH, k_BSKH


class _Rotation(torch.autograd.Function):
    """Rotates; the gradient is rotated by the opposite angle, in as few kernels."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, sin, -1), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    """Rotates the first R features (a, b) of each head to (a cos - b sin, b cos + a sin)."""
    R = cos.shape[-1]
    turned, kept = x[..., :R], x[..., R:]
    rotated = torch.addcmul(turned * cos, turned.roll(R // 2, -1), sin, value=direction)
    if rotated.dtype != x.dtype:
        # Only if needed: compiled by torch < 2.13, a no-op cast at the end of a Function gives zero
        # gradients.
        rotated = rotated.to(x.dtype)
    return torch.cat((rotated, kept), dim=-1) if kept.shape[-1] else rotated


def _scale(frequency_F: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1's scaling: a clamped linear blend of the scaled and the original frequency."""
    periods_F = scaling.original_max_seq_len * frequency_F / (2 * math.pi)
    kept_F = (periods_F - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    return torch.lerp(frequency_F / scaling.factor, frequency_F, kept_F.clamp(0, 1))
