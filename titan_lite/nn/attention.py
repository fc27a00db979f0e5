"""Causal self-attention with grouped key and value heads.

Shape suffixes: B batch, S sequence, D model width, N query heads, K key/value heads, H head dim.
"""

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from titan_lite.nn.documents import DocumentMask, attend_in_documents
from titan_lite.nn.rope import RotaryEmbedding


class ScaledDotProductAttention(nn.Module):
    """softmax(q k / sqrt(H)) v over the past, by torch's fused kernels; masked, over part of it."""

    def forward(
        self, q_BNSH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, mask: DocumentMask | None = None
    ) -> Tensor:
        if mask is not None:
            return attend_in_documents(q_BNSH, k_BKSH, v_BKSH, mask)
        return scaled_dot_product_attention(
            q_BNSH,
            k_BKSH,
            v_BKSH,
            is_causal=True,
            # Only where needed: some fused kernels refuse the flag even with equal head counts.
            enable_gqa=q_BNSH.shape[1] != k_BKSH.shape[1],
        )


class Attention(nn.Module):
    """Projections without biases and rotary embedding around `inner_attention`.

    The inner attention has no parameters and sees heads only: what splits a sequence over devices
    puts its own in its place.
    """

    def __init__(
        self, dim: int, num_heads: int, num_kv_heads: int, head_dim: int, rope: RotaryEmbedding
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.wq = nn.Linear(dim, num_heads * head_dim, bias=False)
        self.wk = nn.Linear(dim, num_kv_heads * head_dim, bias=False)
        self.wv = nn.Linear(dim, num_kv_heads * head_dim, bias=False)
        self.wo = nn.Linear(num_heads * head_dim, dim, bias=False)
        self.rope = rope
        self.inner_attention: nn.Module = ScaledDotProductAttention()

    def forward(
        self,
        x_BSD: Tensor,
        positions_S: Tensor | None = None,
        mask: DocumentMask | None = None,
    ) -> Tensor:
        # -1: under tensor parallelism the projections return this rank's heads only.
        heads = (*x_BSD.shape[:2], -1, self.head_dim)
        q_BSNH = self.rope(self.wq(x_BSD).view(heads), positions_S)
        k_BSKH = self.rope(self.wk(x_BSD).view(heads), positions_S)
        v_BSKH = self.wv(x_BSD).view(heads)
        out_BNSH = self.inner_attention(
            q_BSNH.transpose(1, 2), k_BSKH.transpose(1, 2), v_BSKH.transpose(1, 2), mask
        )
        out_BSD: Tensor = self.wo(out_BNSH.transpose(1, 2).flatten(2))
        return out_BSD
