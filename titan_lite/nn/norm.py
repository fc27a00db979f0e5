"""Norms for a residual stream whose dtype may be wider than that of the block's computation."""

from torch import Tensor, nn
from torch.nn.functional import layer_norm, rms_norm

from titan_lite.config.schema import NormKind


class RMSNorm(nn.RMSNorm):
    """RMSNorm (arXiv:1910.07467), computed in its input's dtype; the output has the weight's."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype)
        return rms_norm(x, self.normalized_shape, weight, self.eps).to(self.weight.dtype)


class LayerNorm(nn.LayerNorm):
    """LayerNorm (arXiv:1607.06450), computed in its input's dtype; the output has the weight's."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return layer_norm(x, self.normalized_shape, weight, bias, self.eps).to(self.weight.dtype)


NORMS: dict[NormKind, type[RMSNorm | LayerNorm]] = {"rmsnorm": RMSNorm, "layernorm": LayerNorm}
"""Classes by the value of model.norm."""
