"""The transformer block, with norms before or after attention and feed-forward.

Shape suffixes: B batch, S sequence, D model width.
"""

from torch import Tensor, nn

from titan_lite.models.args import DecoderArgs
from titan_lite.nn.attention import build_attention
from titan_lite.nn.dropout import build_dropout
from titan_lite.nn.feed_forward import build_feed_forward
from titan_lite.nn.norm import NORMS
from titan_lite.nn.token_context import TokenContext


class Block(nn.Module):
    """Attention and feed-forward, each after a norm, and added to the residual stream.

    It has no layer number, so that equal blocks share one compiled graph.
    """

    def __init__(self, args: DecoderArgs, rope: nn.Module) -> None:
        super().__init__()
        norm = NORMS[args.norm]
        self.attention_norm = norm(args.dim, eps=args.norm_eps)
        self.attention = build_attention(args, rope)
        self.ffn_norm = norm(args.dim, eps=args.norm_eps)
        self.feed_forward = build_feed_forward(args)
        self.attention_dropout = build_dropout(args.hidden_dropout, salt=2)
        self.ffn_dropout = build_dropout(args.hidden_dropout, salt=3)

    def attend(self, x_BSD: Tensor, context: TokenContext) -> Tensor:
        """Returns the output of attention, for the residual stream."""
        # By keyword, because tensor parallel gathers the positional arguments.
        out_BSD = self.attention(x_BSD, context=context)
        dropped_BSD: Tensor = self.attention_dropout(out_BSD, context.dropout_keys_BS)
        return dropped_BSD

    def feed(self, x_BSD: Tensor, context: TokenContext) -> Tensor:
        """Returns the output of the feed-forward, for the residual stream."""
        dropped_BSD: Tensor = self.ffn_dropout(self.feed_forward(x_BSD), context.dropout_keys_BS)
        return dropped_BSD

    def forward(self, x_BSD: Tensor, context: TokenContext) -> Tensor:
        normed_BSD = self.attention_norm(x_BSD)
        h_BSD = x_BSD + self.attend(normed_BSD, context)
        return h_BSD + self.feed(self.ffn_norm(h_BSD), context)


class ParallelBlock(Block):
    """Attention and feed-forward in parallel, on the same input (GPT-J, GPT-NeoX)."""

    def forward(self, x_BSD: Tensor, context: TokenContext) -> Tensor:
        normed_BSD = self.attention_norm(x_BSD)
        attended_BSD = self.attend(normed_BSD, context)
        return x_BSD + attended_BSD + self.feed(self.ffn_norm(x_BSD), context)


class PostNormBlock(Block):
    """Attention and feed-forward; a norm follows each sum, as in the original transformer."""

    def forward(self, x_BSD: Tensor, context: TokenContext) -> Tensor:
        attended_BSD = self.attend(x_BSD, context)
        h_BSD = self.attention_norm(x_BSD + attended_BSD)
        out_BSD: Tensor = self.ffn_norm(h_BSD + self.feed(h_BSD, context))
        return out_BSD
