"""Parameters of a model and FLOPs per token, by the formulas of the field."""

import functools
import math
from dataclasses import dataclass

from titan_lite.models.args import DecoderArgs, EncoderArgs, LatentArgs, MoEArgs


@dataclass(frozen=True)
class FlopsPerToken:
    """FLOPs of forward and backward per token of the whole model.

    model: with full attention (torchtitan), for comparison with published tables.
    causal: with the half of the attention scores that a causal mask keeps, if there is one.
    hardware: with recomputation of whole blocks; None if there is none. Recomputation by a policy
        of single operations or by the compiler is not counted.
    """

    model: int
    causal: int
    hardware: int | None = None


def num_params(args: DecoderArgs) -> int:
    """Parameters of the model; a head that is tied to the input embedding adds none."""
    # One norm outside blocks: after a decoder's blocks, or a post-norm encoder's embeddings.
    rest = num_block_params(args) + _norm(args) + args.dim * args.vocab_size
    if isinstance(args, EncoderArgs):
        transform = args.dim * (args.dim + 1) + _norm(args)
        rest += transform + args.vocab_size + num_pair_head_params(args)
    return rest + num_looked_up_params(args)


def num_unused_params(args: DecoderArgs) -> int:
    """Parameters that are in no matmul of a token.

    Embeddings are looked up, the next-sentence head sees one token of a sample, and a token skips
    the experts that its router did not choose.
    """
    return num_looked_up_params(args) + num_pair_head_params(args) + num_inactive_params(args)


def in_words(num_params: int, args: DecoderArgs) -> str:
    """Formats a number of parameters, with the number of active ones if that is smaller."""
    inactive = num_inactive_params(args)
    active = f" ({num_params - inactive:,} active)" if inactive else ""
    return f"{num_params:,}{active}"


def num_inactive_params(args: DecoderArgs) -> int:
    """Parameters of the experts that a token is not routed to."""
    return num_block_params(args) - num_active_params(args, 0, args.num_layers)


def num_active_params(args: DecoderArgs, start: int, end: int) -> int:
    """Parameters of a range of blocks that a token uses."""
    shared, experts = block_params(args, start, end)
    return shared + (experts * args.top_k // args.num_experts if isinstance(args, MoEArgs) else 0)


def num_looked_up_params(args: DecoderArgs) -> int:
    """Parameters of the input embeddings, without one that is tied to the head."""
    rows = 0 if args.tied_head else args.vocab_size
    rows += args.max_seq_len if args.positions == "learned" else 0
    rows += args.num_token_types if isinstance(args, EncoderArgs) else 0
    return rows * args.dim


def num_pair_head_params(args: DecoderArgs) -> int:
    """Parameters of an encoder's pooler and next-sentence classifier."""
    if not isinstance(args, EncoderArgs):
        return 0
    return (args.dim + 1) * (args.dim + 2)


def num_last_matmul_params(args: DecoderArgs) -> int:
    """Parameters of all blocks' last matmuls; 0 for blocks that end with a norm or experts."""
    if isinstance(args, EncoderArgs) and args.post_norm:
        return 0
    blocks = map(args.of_block, range(args.num_layers))
    return sum(args.dim * block.ffn_dim for block in blocks if not feed_forwards(block)[1])


def feed_forwards(args: DecoderArgs) -> tuple[int, int]:
    """Returns (feed-forwards that every token uses, experts that a router chooses) of a block."""
    if isinstance(args, MoEArgs) and args.num_experts:
        return args.shared_experts, args.top_k
    return 1, 0


def num_block_params(args: DecoderArgs) -> int:
    """Parameters of all transformer blocks: attention, feed-forward and norms."""
    return sum(block_params(args, 0, args.num_layers))


@functools.cache
def block_params(args: DecoderArgs, start: int, end: int) -> tuple[int, int]:
    """Parameters of a range of blocks: (used by every token, in routed experts)."""
    blocks = [args.of_block(index) for index in range(start, end)]
    experts = sum(
        3 * block.num_experts * block.dim * block.ffn_dim
        for block in blocks
        if isinstance(block, MoEArgs)
    )
    return sum(map(_num_shared_params, blocks)), experts


def _num_shared_params(args: DecoderArgs) -> int:
    """Parameters of a block that every token uses."""
    inner = 2 if args.ffn == "swiglu" else 1
    biases = (args.attention_dim + 2 * args.kv_dim) * args.qkv_bias + args.dim * args.out_bias
    biases += (inner * args.ffn_dim + args.dim) * args.ffn_bias
    scales = 2 * args.head_size * args.qk_norm + 2 * _norm(args)
    if isinstance(args, LatentArgs):
        scales += (args.q_rank or 0) + args.kv_rank
    return round(sum(math.prod(sides) for sides in block_products(args))) + biases + scales


def attention_matrices(args: DecoderArgs, tp: int = 1) -> list[tuple[int, int]]:
    """(in, out) features of attention's projections on one of `tp` ranks, in order of execution."""
    if isinstance(args, LatentArgs):
        N, queries, rank = args.num_heads, args.num_heads * args.head_size, args.q_rank
        return [
            *([(args.dim, queries)] if rank is None else [(args.dim, rank), (rank, queries)]),
            (args.dim, args.kv_rank + args.rope_dim),
            (args.kv_rank, N * (args.nope_dim + args.v_dim)),
            (N * args.v_dim, args.dim),
        ]
    q, kv = args.attention_dim // tp, args.kv_dim // tp
    return [(args.dim, q), (args.dim, kv), (args.dim, kv), (q, args.dim)]


def block_products(args: DecoderArgs, tp: int = 1) -> list[tuple[float, float]]:
    """(in, out) features of a block's matmuls over all tokens, on one of `tp` ranks, in order.

    The router's is one of them; tensor-parallel ranks divide its tokens among themselves.
    """
    shared, routed = feed_forwards(args)
    width = shared * args.ffn_dim / tp
    inner = [(args.dim, width)] * (2 if args.ffn == "swiglu" else 1)
    router = [(args.dim, args.num_experts / tp)] if isinstance(args, MoEArgs) and routed else []
    feed_forward = [*inner, (width, args.dim)] if shared else []
    return [*attention_matrices(args, tp), *router, *feed_forward]


def block_matrices(args: DecoderArgs) -> list[tuple[int, int]]:
    """(smaller, larger) side of each matrix of a block."""
    inner = 2 if args.ffn == "swiglu" else 1
    experts = args.num_experts if isinstance(args, MoEArgs) else 1
    sides = attention_matrices(args) + [(args.dim, args.ffn_dim)] * (inner + 1) * experts
    return [(min(pair), max(pair)) for pair in sides]


def _norm(args: DecoderArgs) -> int:
    return args.dim * (2 if args.norm == "layernorm" else 1)


def flops_per_token(
    args: DecoderArgs,
    seq_len: int,
    num_params_non_embedding: int,
    num_block_params: int,
    num_recomputed_layers: int = 0,
) -> FlopsPerToken:
    """Computes FLOPs per token from numbers of parameters.

    num_params_non_embedding: includes a tied head. num_recomputed_layers: blocks with full
    activation checkpointing; all blocks count as equal. Their last matmuls are not recomputed,
    because torch.utils.checkpoint stops once it has the last saved tensor.
    """
    attention = 12 * args.num_layers * args.attention_dim * seq_len
    model = 6 * num_params_non_embedding + attention
    # A forward is a third of the FLOPs: 2 per parameter, 4 per attention score and feature.
    # Model FLOPs versus hardware FLOPs: Korthikanti et al., arXiv:2205.05198, appendix A.
    again = 2 * (num_block_params - num_last_matmul_params(args)) + attention // 3
    again = again * num_recomputed_layers // args.num_layers
    return FlopsPerToken(
        model=model,
        causal=model - attention // 2 if args.causal else model,
        hardware=model + again if num_recomputed_layers else None,
    )
