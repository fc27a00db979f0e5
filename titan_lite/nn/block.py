"""The pre-norm transformer block.

Shape suffixes: B batch, S sequence, D model width.
"""

from torch import Tensor, nn

from titan_lite.models.args import DecoderArgs
from titan_lite.nn.attention import Attention
from titan_lite.nn.documents import DocumentMask
from titan_lite.nn.feed_forward import FeedForward
from titan_lite.nn.norm import RMSNorm
from titan_lite.nn.rope import RotaryEmbedding


class Block(nn.Module):
    """Attention and feed-forward, each normalised before and added to the residual stream.

    Knows no layer number: equal blocks share one compiled graph.
    """

    def __init__(self, args: DecoderArgs, rope: RotaryEmbedding) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(args.dim, eps=args.norm_eps)
        self.attention = Attention(args.dim, args.num_heads, args.num_kv_heads, args.head_dim, rope)
        self.ffn_norm = RMSNorm(args.dim, eps=args.norm_eps)
        self.feed_forward = FeedForward(args.dim, args.ffn_dim)

    def forward(
        self,
        x_BSD: Tensor,
        positions_S: Tensor | None = None,
        mask: DocumentMask | None = None,
    ) -> Tensor:
        # By keyword: what tensor parallel gathers for the attention is its only positional input.
        attended_BSD = self.attention(
            self.attention_norm(x_BSD), positions_S=positions_S, mask=mask
        )
        h_BSD: Tensor = x_BSD + attended_BSD
        out_BSD: Tensor = h_BSD + self.feed_forward(self.ffn_norm(h_BSD))
        return out_BSD
