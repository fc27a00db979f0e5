"""The transformer block, with its norms before what it adds or after.

Shape suffixes: B batch, S sequence, D model width.
"""

from torch import Tensor, nn

from titan_lite.models.args import DecoderArgs
from titan_lite.nn.attention import Attention
from titan_lite.nn.documents import DocumentMask
from titan_lite.nn.feed_forward import build_feed_forward
from titan_lite.nn.norm import NORMS


class Block(nn.Module):
    """Attention and feed-forward, each normalised before and added to the residual stream.

    Knows no layer number: equal blocks share one compiled graph.
    """

    def __init__(self, args: DecoderArgs, rope: nn.Module) -> None:
        super().__init__()
        norm = NORMS[args.norm]
        self.attention_norm = norm(args.dim, eps=args.norm_eps)
        self.attention = Attention(args, rope)
        self.ffn_norm = norm(args.dim, eps=args.norm_eps)
        self.feed_forward = build_feed_forward(args)

    def attend(
        self, x_BSD: Tensor, positions_S: Tensor | None, mask: DocumentMask | None
    ) -> Tensor:
        """What attention adds to the residual stream."""
        # By keyword: what tensor parallel gathers for the attention is its only positional input.
        attended_BSD: Tensor = self.attention(
            self.attention_norm(x_BSD), positions_S=positions_S, mask=mask
        )
        return attended_BSD

    def forward(
        self,
        x_BSD: Tensor,
        positions_S: Tensor | None = None,
        mask: DocumentMask | None = None,
    ) -> Tensor:
        h_BSD = x_BSD + self.attend(x_BSD, positions_S, mask)
        out_BSD: Tensor = h_BSD + self.feed_forward(self.ffn_norm(h_BSD))
        return out_BSD


class ParallelBlock(Block):
    """Attention and feed-forward beside each other, on the same input (GPT-J, GPT-NeoX)."""

    def forward(
        self,
        x_BSD: Tensor,
        positions_S: Tensor | None = None,
        mask: DocumentMask | None = None,
    ) -> Tensor:
        attended_BSD = self.attend(x_BSD, positions_S, mask)
        out_BSD: Tensor = x_BSD + attended_BSD + self.feed_forward(self.ffn_norm(x_BSD))
        return out_BSD


class PostNormBlock(Block):
    """Attention and feed-forward, each added to its input and the sum normalised (the original)."""

    def forward(
        self,
        x_BSD: Tensor,
        positions_S: Tensor | None = None,
        mask: DocumentMask | None = None,
    ) -> Tensor:
        attended_BSD = self.attention(x_BSD, positions_S=positions_S, mask=mask)
        h_BSD = self.attention_norm(x_BSD + attended_BSD)
        out_BSD: Tensor = self.ffn_norm(h_BSD + self.feed_forward(h_BSD))
        return out_BSD
