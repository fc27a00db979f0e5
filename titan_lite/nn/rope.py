"""Rotary position embedding in Hugging Face's rotate-half convention.

Shape suffixes: B batch, S sequence, N heads, H head dim, F rotary frequencies (half of
the features that are rotated).
"""

import math

import torch
from torch import Tensor, nn

from titan_lite.models.args import DecoderArgs, RopeScaling


class NoRotation(nn.Module):
    """Leaves queries and keys alone, where positions are learned."""

    def forward(self, x_BSNH: Tensor, positions_S: Tensor | None = None) -> Tensor:
        return x_BSNH


class RotaryEmbedding(nn.Module):
    """Rotates queries and keys by their position; one instance is shared by all blocks.

    Of each head the first `rotary_dim` features are rotated, the others kept.

    The tables are buffers of this shared module, not arguments of the block: FSDP2 casts a
    block's floating arguments to param_dtype, and angles need float32. Shared, because
    131,072 positions take 64 MiB; non-persistent, because a few numbers define them.
    """

    cos_SF: Tensor
    sin_SF: Tensor

    def __init__(self, args: DecoderArgs) -> None:
        super().__init__()
        self.rotary_dim = args.rotary_dim
        self.max_seq_len = args.max_seq_len
        self.theta = args.rope_theta
        self.scaling = args.rope_scaling
        self.init_buffers(None)

    def init_buffers(self, device: torch.device | str | None) -> None:
        """Computes the tables on `device`; needed once more after a meta build."""
        exponent_F = torch.arange(0, self.rotary_dim, 2, device=device).float() / self.rotary_dim
        frequency_F = 1.0 / self.theta**exponent_F
        if self.scaling is not None:
            frequency_F = _scale(frequency_F, self.scaling)
        position_S = torch.arange(self.max_seq_len, device=device).float()
        angle_SF = torch.outer(position_S, frequency_F)
        self.register_buffer("cos_SF", angle_SF.cos(), persistent=False)
        self.register_buffer("sin_SF", angle_SF.sin(), persistent=False)

    def forward(self, x_BSNH: Tensor, positions_S: Tensor | None = None) -> Tensor:
        """Rotates in float32, returns x's dtype and shape.

        positions_S: of x's tokens, (B, S) where rows differ; None: they are at 0 to S - 1.
        """
        rows = slice(x_BSNH.shape[1]) if positions_S is None else positions_S
        cos_S1F, sin_S1F = self.cos_SF[rows, None], self.sin_SF[rows, None]
        F = cos_S1F.shape[-1]
        a_BSNF, b_BSNF, kept = x_BSNH.float().split((F, F, x_BSNH.shape[-1] - 2 * F), dim=-1)
        rotated = (a_BSNF * cos_S1F - b_BSNF * sin_S1F, b_BSNF * cos_S1F + a_BSNF * sin_S1F)
        return torch.cat((*rotated, kept), dim=-1).type_as(x_BSNH)


def _scale(frequency_F: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1's scaling: a clamped linear blend between the stretched and the kept frequency."""
    periods_F = scaling.original_max_seq_len * frequency_F / (2 * math.pi)
    kept_F = (periods_F - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    return torch.lerp(frequency_F / scaling.factor, frequency_F, kept_F.clamp(0, 1))
