"""Self-attention with grouped key and value heads.

Shape suffixes: B batch, S sequence, D model width, N query heads, K key/value heads, H head dim,
R rotated features of a head, V features of a value.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention

from titan_lite.models.args import DecoderArgs, LatentArgs
from titan_lite.nn.document_attention import attend_in_documents
from titan_lite.nn.dropout import drop, hash32
from titan_lite.nn.norm import RMSNorm
from titan_lite.nn.token_context import TokenContext

# eps of the norms inside latent attention, independent of norm_eps.
LATENT_EPS = 1e-6


class ScaledDotProductAttention(nn.Module):
    """softmax(q k / sqrt(H)) v by torch's fused kernels, with an optional mask.

    causal: each token attends to itself and earlier tokens only.
    """

    def __init__(self, *, causal: bool) -> None:
        super().__init__()
        self.causal = causal

    def forward(
        self, q_BNSH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, context: TokenContext
    ) -> Tensor:
        if context.mask is not None:
            return attend_in_documents(q_BNSH, k_BKSH, v_BKSH, context.mask, causal=self.causal)
        return scaled_dot_product_attention(
            q_BNSH,
            k_BKSH,
            v_BKSH,
            is_causal=self.causal,
            # Only if needed: some fused kernels reject the flag even with equal head counts.
            enable_gqa=q_BNSH.shape[1] != k_BKSH.shape[1],
        )


class DropoutAttention(ScaledDotProductAttention):
    """Attention with dropout of its weights, which are stored: (B, N, S, S).

    Fused kernels would drop different weights in different layouts. salt: see Dropout. shard: index
    of this device's part of the heads, which are split into equal parts.
    """

    shard = 0

    def __init__(self, p: float, salt: int, *, causal: bool) -> None:
        super().__init__(causal=causal)
        self.p = p
        self.salt = salt

    def forward(
        self, q_BNSH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, context: TokenContext
    ) -> Tensor:
        mask, keys_BS = context.mask, context.dropout_keys_BS
        if keys_BS is None:
            return super().forward(q_BNSH, k_BKSH, v_BKSH, context)
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
        keys_BNS = hash32(hash32(keys_BS ^ self.salt)[:, None] ^ heads_N[:, None])
        return drop(weights_BNSS, keys_BNS, self.p) @ v_BNSH


class Attention(nn.Module):
    """Projections, normalization of heads and rotary embedding around `inner_attention`.

    The inner attention has no parameters. Context parallel replaces it.
    """

    def __init__(self, args: DecoderArgs, rope: nn.Module) -> None:
        """rope: a module called with (queries, keys, positions), see nn/rope.py."""
        super().__init__()
        self.head_size = args.head_size
        self.make_projections(args)
        self.rope = rope
        self.inner_attention: nn.Module = (
            DropoutAttention(args.attention_dropout, salt=1, causal=args.causal)
            if args.attention_dropout
            else ScaledDotProductAttention(causal=args.causal)
        )

    def make_projections(self, args: DecoderArgs) -> None:
        """Makes the modules with parameters."""
        self.wq = nn.Linear(args.dim, args.attention_dim, bias=args.qkv_bias)
        self.wk = nn.Linear(args.dim, args.kv_dim, bias=args.qkv_bias)
        self.wv = nn.Linear(args.dim, args.kv_dim, bias=args.qkv_bias)
        self.wo = nn.Linear(args.attention_dim, args.dim, bias=args.out_bias)
        self.q_norm, self.k_norm = (
            RMSNorm(args.head_size, eps=args.norm_eps) if args.qk_norm else nn.Identity()
            for _ in range(2)
        )

    def forward(self, x_BSD: Tensor, context: TokenContext) -> Tensor:
        # -1: under tensor parallelism the projections return this rank's heads only.
        heads = (*x_BSD.shape[:2], -1, self.head_size)
        q_BSNH = self.q_norm(self.wq(x_BSD).view(heads))
        k_BSKH = self.k_norm(self.wk(x_BSD).view(heads))
        q_BSNH, k_BSKH = self.rope(q_BSNH, k_BSKH, context.positions_S)
        v_BSKH = self.wv(x_BSD).view(heads)
        out_BSNH = self.attend(q_BSNH, k_BSKH, v_BSKH, context)
        out_BSD: Tensor = self.wo(out_BSNH.flatten(2))
        return out_BSD

    def attend(
        self, q_BSNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, context: TokenContext
    ) -> Tensor:
        """Returns the inner attention's output, (B, S, N, H)."""
        q_BNSH, k_BKSH, v_BKSH = (t.transpose(1, 2) for t in (q_BSNH, k_BSKH, v_BSKH))
        out_BNSH: Tensor = self.inner_attention(q_BNSH, k_BKSH, v_BKSH, context)
        return out_BNSH.transpose(1, 2)


class LatentAttention(Attention):
    """Multi-head latent attention (arXiv:2405.04434): keys and values of all heads are projected
    from one narrow vector of the token, and the rotated part of the keys is the same in all heads.
    """

    wq: nn.Linear | None  # type: ignore[assignment]

    def __init__(self, args: LatentArgs, rope: nn.Module) -> None:
        super().__init__(args, rope)
        self.kv_sizes = args.kv_rank, args.rope_dim
        self.query_sizes = args.nope_dim, args.rope_dim
        self.value_sizes = args.nope_dim, args.v_dim

    def make_projections(self, args: DecoderArgs) -> None:
        assert isinstance(args, LatentArgs)
        D, queries, rank = args.dim, args.num_heads * args.head_size, args.q_rank
        if rank is None:
            self.wq = nn.Linear(D, queries, bias=False)
        else:
            self.wq = None
            self.wq_a = nn.Linear(D, rank, bias=False)
            self.q_norm = RMSNorm(rank, eps=LATENT_EPS)
            self.wq_b = nn.Linear(rank, queries, bias=False)
        self.wkv_a = nn.Linear(D, args.kv_rank + args.rope_dim, bias=False)
        # Tensor parallel sums gradients from each rank's heads here.
        self.copy = nn.Identity()
        self.kv_norm = RMSNorm(args.kv_rank, eps=LATENT_EPS)
        self.wkv_b = nn.Linear(
            args.kv_rank, args.num_heads * (args.nope_dim + args.v_dim), bias=False
        )
        self.wo = nn.Linear(args.num_heads * args.v_dim, D, bias=False)

    def forward(self, x_BSD: Tensor, context: TokenContext) -> Tensor:
        q = self.wq(x_BSD) if self.wq is not None else self.wq_b(self.q_norm(self.wq_a(x_BSD)))
        q_BSNH = q.unflatten(-1, (-1, self.head_size))
        latent, k_BSR = self.wkv_a(x_BSD).split(self.kv_sizes, dim=-1)
        kv_BSNX = self.wkv_b(self.kv_norm(latent)).unflatten(-1, (-1, sum(self.value_sizes)))
        k_nope, v_BSNV = kv_BSNX.split(self.value_sizes, dim=-1)
        q_nope, q_BSNR = q_BSNH.split(self.query_sizes, dim=-1)
        q_BSNR, k_BS1R = self.rope(
            pairs_to_halves(q_BSNR),
            pairs_to_halves(self.copy(k_BSR).unsqueeze(2)),
            context.positions_S,
        )
        q_BSNH = torch.cat((q_nope, q_BSNR), dim=-1)
        k_BSNH = torch.cat((k_nope, k_BS1R.expand_as(q_BSNR)), dim=-1)
        # Fused kernels require equal head sizes: pad values with zeros, and cut these off.
        V = v_BSNV.shape[-1]
        v_BSNH = pad(v_BSNV, (0, self.head_size - V))
        out_BSNH = self.attend(q_BSNH, k_BSNH, v_BSNH, context)
        out_BSD: Tensor = self.wo(out_BSNH[..., :V].flatten(2))
        return out_BSD


def pairs_to_halves(x: Tensor) -> Tensor:
    """Reorders a head's features from (a0, b0, a1, b1, ...) to (a0, a1, ..., b0, b1, ...)."""
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def build_attention(args: DecoderArgs, rope: nn.Module) -> Attention:
    """Builds the attention of one block."""
    return LatentAttention(args, rope) if isinstance(args, LatentArgs) else Attention(args, rope)
