"""Normalisation of a residual stream that may be wider than what the block computes in."""

from torch import Tensor, nn
from torch.nn.functional import rms_norm


class RMSNorm(nn.RMSNorm):
    """RMSNorm (arXiv:1910.07467) in its input's dtype; its output has its weight's."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype)
        return rms_norm(x, self.normalized_shape, weight, self.eps).to(self.weight.dtype)
