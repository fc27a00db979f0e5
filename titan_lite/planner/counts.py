"""Parameters of a model and FLOPs per token, by the formulas of the field."""

from dataclasses import dataclass

from titan_lite.models.args import DecoderArgs

FORMULA = (
    "6 * (parameters - input embedding) + 12 * layers * attention_dim * seq_len; what causal and "
    "document masks hide is not subtracted, and padding is no token"
)
"""What `mfu` counts: torchtitan's convention, full attention, nothing for recomputation."""


@dataclass(frozen=True)
class FlopsPerToken:
    """FLOPs of forward and backward per token of the whole model.

    model: full attention (torchtitan), for comparison with published tables.
    causal: only the half of the attention scores that a causal mask keeps.
    hardware: what is executed, recomputation included; None when no block is recomputed whole:
        what a policy of single operations, or the compiler, recomputes is not counted here.
    """

    model: int
    causal: int
    hardware: int | None = None


def num_params(args: DecoderArgs) -> int:
    """Parameters of the decoder, untied input embedding and head included."""
    return args.vocab_size * args.dim + num_params_non_embedding(args)


def num_params_non_embedding(args: DecoderArgs) -> int:
    """Parameters less the input embedding, which is a lookup and multiplies nothing."""
    return num_block_params(args) + args.dim + args.dim * args.vocab_size


def num_block_params(args: DecoderArgs) -> int:
    """Parameters of all transformer blocks: attention, gated feed-forward, two RMSNorms each."""
    query, key_value = args.num_heads * args.head_dim, args.num_kv_heads * args.head_dim
    attention = 2 * args.dim * query + 2 * args.dim * key_value
    feed_forward = 3 * args.dim * args.ffn_dim
    return args.num_layers * (attention + feed_forward + 2 * args.dim)


def flops_per_token(
    *,
    num_params_non_embedding: int,
    num_block_params: int,
    num_layers: int,
    attention_dim: int,
    seq_len: int,
    num_recomputed_layers: int = 0,
    num_last_matmul_params: int = 0,
) -> FlopsPerToken:
    """The numbers that the meter needs, for any decoder whose parameters were counted.

    attention_dim: heads times head_dim. num_recomputed_layers: blocks that are checkpointed whole,
    of equal ones. A head tied to the input embedding multiplies, so its parameters stay in
    `num_params_non_embedding`. num_last_matmul_params: parameters of the matmuls that end all
    blocks (dim * ffn_dim each); they are not repeated, for torch.utils.checkpoint stops once the
    last saved tensor is back.
    """
    attention = 12 * num_layers * attention_dim * seq_len
    model = 6 * num_params_non_embedding + attention
    # A forward is a third of the FLOPs: 2 per parameter, 4 per attention score and feature.
    # Model FLOPs as against executed ones: Korthikanti et al., arXiv:2205.05198, appendix A.
    again = 2 * (num_block_params - num_last_matmul_params) + attention // 3
    again = again * num_recomputed_layers // num_layers
    return FlopsPerToken(
        model=model,
        causal=model - attention // 2,
        hardware=model + again if num_recomputed_layers else None,
    )


def megatron_flops_per_token(
    *,
    dim: int,
    num_layers: int,
    attention_dim: int,
    kv_dim: int,
    ffn_dim: float,
    vocab_size: int,
    seq_len: int,
    gated: bool = True,
    recompute: bool = False,
    causal: bool = False,
) -> float:
    """FLOPs per token by matmul: 3 times the forward; recomputed blocks 4 times, the head still 3.

    Megatron SC'21 (Narayanan et al., arXiv:2104.04473, appendix) is the plain, recomputed case with
    ffn_dim = 4 dim: 96 L h^2 (1 + s / 6h + V / 16 L h). InternLM's get_megatron_flops is the gated
    one with ffn_dim = mlp_ratio dim, not rounded; nanotron's get_flops the gated one, never
    recomputed; Megatron-LM now, NeMo and MaxText halve the attention (causal).
    """
    projections = 4 * dim * attention_dim + 4 * dim * kv_dim
    scores = 4 * seq_len * attention_dim / (2 if causal else 1)
    feed_forward = (6 if gated else 4) * dim * ffn_dim
    blocks = num_layers * (projections + scores + feed_forward)
    return (4 if recompute else 3) * blocks + 3 * 2 * dim * vocab_size
