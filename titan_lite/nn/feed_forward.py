"""The feed-forward networks, gated and plain.

Shape suffixes: B batch, S sequence, D model width.
"""

from dataclasses import replace

from torch import Tensor, nn
from torch.nn.functional import silu

from titan_lite.models.args import DecoderArgs, MoEArgs
from titan_lite.nn.moe import MoE


class GatedFeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202): w2(silu(w1 x) * w3 x)."""

    def __init__(self, args: DecoderArgs) -> None:
        super().__init__()
        self.w1 = nn.Linear(args.dim, args.ffn_dim, bias=args.ffn_bias)
        self.w2 = nn.Linear(args.ffn_dim, args.dim, bias=args.ffn_bias)
        self.w3 = nn.Linear(args.dim, args.ffn_dim, bias=args.ffn_bias)

    def forward(self, x_BSD: Tensor) -> Tensor:
        out_BSD: Tensor = self.w2(silu(self.w1(x_BSD)) * self.w3(x_BSD))
        return out_BSD


class PlainFeedForward(nn.Module):
    """w2(gelu(w1 x))."""

    def __init__(self, args: DecoderArgs) -> None:
        super().__init__()
        self.w1 = nn.Linear(args.dim, args.ffn_dim, bias=args.ffn_bias)
        self.w2 = nn.Linear(args.ffn_dim, args.dim, bias=args.ffn_bias)
        self.gelu = build_gelu(args)

    def forward(self, x_BSD: Tensor) -> Tensor:
        out_BSD: Tensor = self.w2(self.gelu(self.w1(x_BSD)))
        return out_BSD


def build_gelu(args: DecoderArgs) -> nn.GELU:
    """Returns the exact GELU, or its tanh approximation, by model.ffn (arXiv:1606.08415)."""
    return nn.GELU("tanh" if args.ffn == "gelu_tanh" else "none")


def build_feed_forward(args: DecoderArgs) -> nn.Module:
    """Builds a block's feed-forward by model.ffn, or its experts."""
    if isinstance(args, MoEArgs) and args.num_experts:
        width = args.shared_experts * args.ffn_dim
        return MoE(args, GatedFeedForward(replace(args, ffn_dim=width)) if width else None)
    return GatedFeedForward(args) if args.ffn == "swiglu" else PlainFeedForward(args)
