"""Self-attention with grouped key and value heads.

Shape suffixes: B batch, S sequence, D model width, N query heads, K key/value heads, H head dim.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from titan_lite.models.args import DecoderArgs
from titan_lite.nn.documents import DocumentMask, attend_in_documents
from titan_lite.nn.dropout import drop, scramble
from titan_lite.nn.norm import RMSNorm


class ScaledDotProductAttention(nn.Module):
    """softmax(q k / sqrt(H)) v, by torch's fused kernels; masked, over part of what there is.

    causal: over the past alone.
    """

    def __init__(self, *, causal: bool) -> None:
        super().__init__()
        self.causal = causal

    def forward(
        self,
        q_BNSH: Tensor,
        k_BKSH: Tensor,
        v_BKSH: Tensor,
        mask: DocumentMask | None = None,
        dropout_keys_BS: Tensor | None = None,
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


class DropoutAttention(ScaledDotProductAttention):
    """The same with dropout of the softmax' results, which exist as a whole: (B, N, S, S).

    No fused kernel drops the same on every rank that has the head. site: as of Dropout. shard:
    which of as many equal parts of the heads as there are this device has.
    """

    shard = 0

    def __init__(self, p: float, site: int, *, causal: bool) -> None:
        super().__init__(causal=causal)
        self.p = p
        self.site = site

    def forward(
        self,
        q_BNSH: Tensor,
        k_BKSH: Tensor,
        v_BKSH: Tensor,
        mask: DocumentMask | None = None,
        dropout_keys_BS: Tensor | None = None,
    ) -> Tensor:
        if dropout_keys_BS is None:
            return super().forward(q_BNSH, k_BKSH, v_BKSH, mask)
        N, S, H = q_BNSH.shape[1:]
        k_BNSH, v_BNSH = (t.repeat_interleave(N // t.shape[1], dim=1) for t in (k_BKSH, v_BKSH))
        scores_BNSS = q_BNSH @ k_BNSH.transpose(-1, -2) * H**-0.5
        if mask is not None:
            assert isinstance(mask, Tensor)
            scores_BNSS = scores_BNSS + mask
        elif self.causal:
            future_SS = torch.ones(S, S, dtype=torch.bool, device=q_BNSH.device).triu(1)
            scores_BNSS = scores_BNSS.masked_fill(future_SS, -torch.inf)
        weights_BNSS = scores_BNSS.softmax(-1, dtype=torch.float32).type_as(v_BNSH)
        heads_N = torch.arange(
            self.shard * N, (self.shard + 1) * N, dtype=torch.int32, device=q_BNSH.device
        )
        keys_BNS = scramble(scramble(dropout_keys_BS ^ self.site)[:, None] ^ heads_N[:, None])
        return drop(weights_BNSS, keys_BNS, self.p) @ v_BNSH


class Attention(nn.Module):
    """Projections, normalisation of heads and rotary embedding around `inner_attention`.

    The inner attention has no parameters and sees heads only: what splits a sequence over devices
    replaces it by its own.
    """

    def __init__(self, args: DecoderArgs, rope: nn.Module) -> None:
        """rope: of (queries, keys, positions), see nn/rope.py."""
        super().__init__()
        self.head_size = args.head_size
        self.make_projections(args)
        self.rope = rope
        self.inner_attention: nn.Module = (
            DropoutAttention(args.attention_dropout, site=1, causal=args.causal)
            if args.attention_dropout
            else ScaledDotProductAttention(causal=args.causal)
        )

    def make_projections(self, args: DecoderArgs) -> None:
        """Makes the modules that have parameters."""
        self.wq = nn.Linear(args.dim, args.attention_dim, bias=args.qkv_bias)
        self.wk = nn.Linear(args.dim, args.kv_dim, bias=args.qkv_bias)
        self.wv = nn.Linear(args.dim, args.kv_dim, bias=args.qkv_bias)
        self.wo = nn.Linear(args.attention_dim, args.dim, bias=args.out_bias)
        self.q_norm, self.k_norm = (
            RMSNorm(args.head_size, eps=args.norm_eps) if args.qk_norm else nn.Identity()
            for _ in range(2)
        )

    def forward(
        self,
        x_BSD: Tensor,
        positions_S: Tensor | None = None,
        mask: DocumentMask | None = None,
        dropout_keys_BS: Tensor | None = None,
    ) -> Tensor:
        # -1: under tensor parallelism the projections return this rank's heads only.
        heads = (*x_BSD.shape[:2], -1, self.head_size)
        q_BSNH = self.q_norm(self.wq(x_BSD).view(heads))
        k_BSKH = self.k_norm(self.wk(x_BSD).view(heads))
        q_BSNH, k_BSKH = self.rope(q_BSNH, k_BSKH, positions_S)
        v_BSKH = self.wv(x_BSD).view(heads)
        out_BSNH = self.attend(q_BSNH, k_BSKH, v_BSKH, mask, dropout_keys_BS)
        out_BSD: Tensor = self.wo(out_BSNH.flatten(2))
        return out_BSD

    def attend(
        self,
        q_BSNH: Tensor,
        k_BSKH: Tensor,
        v_BSKH: Tensor,
        mask: DocumentMask | None,
        dropout_keys_BS: Tensor | None,
    ) -> Tensor:
        """Returns the inner attention's output, (B, S, N, H)."""
        q_BNSH, k_BKSH, v_BKSH = (t.transpose(1, 2) for t in (q_BSNH, k_BSKH, v_BSKH))
        out_BNSH: Tensor = self.inner_attention(q_BNSH, k_BKSH, v_BKSH, mask, dropout_keys_BS)
        return out_BNSH.transpose(1, 2)
