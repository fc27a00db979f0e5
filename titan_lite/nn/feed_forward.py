"""The gated feed-forward network.

Shape suffixes: B batch, S sequence, D model width.
"""

from torch import Tensor, nn
from torch.nn.functional import silu


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202): w2(silu(w1 x) * w3 x), without biases."""

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, ffn_dim, bias=False)
        self.w2 = nn.Linear(ffn_dim, dim, bias=False)
        self.w3 = nn.Linear(dim, ffn_dim, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        out_BSD: Tensor = self.w2(silu(self.w1(x_BSD)) * self.w3(x_BSD))
        return out_BSD
