"""Self-attention with grouped key and value heads.

Shape suffixes: B batch, S sequence, D model width, N query heads, K key/value heads, H head dim.
"""

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from titan_lite.models.args import DecoderArgs
from titan_lite.nn.documents import DocumentMask, attend_in_documents
from titan_lite.nn.norm import RMSNorm


class ScaledDotProductAttention(nn.Module):
    """softmax(q k / sqrt(H)) v, by torch's fused kernels; masked, over part of what there is.

    causal: over the past alone.
    """

    def __init__(self, *, causal: bool) -> None:
        super().__init__()
        self.causal = causal

    def forward(
        self, q_BNSH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, mask: DocumentMask | None = None
    ) -> Tensor:
        if mask is not None:
            return attend_in_documents(q_BNSH, k_BKSH, v_BKSH, mask, causal=self.causal)
        return scaled_dot_product_attention(
            q_BNSH,
            k_BKSH,
            v_BKSH,
            is_causal=self.causal,
            # Only where needed: some fused kernels refuse the flag even with equal head counts.
            enable_gqa=q_BNSH.shape[1] != k_BKSH.shape[1],
        )


class Attention(nn.Module):
    """Projections, normalisation of heads and rotary embedding around `inner_attention`.

    The inner attention has no parameters and sees heads only: what splits a sequence over devices
    puts its own in its place.
    """

    def __init__(self, args: DecoderArgs, rope: nn.Module) -> None:
        """rope: of (heads, positions), see nn/rope.py."""
        super().__init__()
        self.head_size = args.head_size
        self.wq = nn.Linear(args.dim, args.attention_dim, bias=args.qkv_bias)
        self.wk = nn.Linear(args.dim, args.kv_dim, bias=args.qkv_bias)
        self.wv = nn.Linear(args.dim, args.kv_dim, bias=args.qkv_bias)
        self.wo = nn.Linear(args.attention_dim, args.dim, bias=args.out_bias)
        self.q_norm, self.k_norm = (
            RMSNorm(args.head_size, eps=args.norm_eps) if args.qk_norm else nn.Identity()
            for _ in range(2)
        )
        self.rope = rope
        self.inner_attention: nn.Module = ScaledDotProductAttention(causal=args.causal)

    def forward(
        self,
        x_BSD: Tensor,
        positions_S: Tensor | None = None,
        mask: DocumentMask | None = None,
    ) -> Tensor:
        # -1: under tensor parallelism the projections return this rank's heads only.
        heads = (*x_BSD.shape[:2], -1, self.head_size)
        q_BSNH = self.rope(self.q_norm(self.wq(x_BSD).view(heads)), positions_S)
        k_BSKH = self.rope(self.k_norm(self.wk(x_BSD).view(heads)), positions_S)
        v_BSKH = self.wv(x_BSD).view(heads)
        out_BNSH = self.inner_attention(
            q_BSNH.transpose(1, 2), k_BSKH.transpose(1, 2), v_BSKH.transpose(1, 2), mask
        )
        out_BSD: Tensor = self.wo(out_BNSH.transpose(1, 2).flatten(2))
        return out_BSD
