"""The numbers and choices that define one model."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from titan_lite.config.schema import BalanceKind, FFNKind, NormKind, PositionKind, ScoreKind

# The same multiple in every layout, so that a checkpoint does not depend on parallel.tp.
VOCAB_MULTIPLE = 128


def pad_vocab_size(vocab_size: int) -> int:
    """Rounds a vocabulary size up to a multiple of VOCAB_MULTIPLE."""
    return math.ceil(vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3.1's scaling of the low rotary frequencies.

    Wavelengths (in tokens) above original_max_seq_len / low_freq_factor are multiplied by
    `factor`, those below original_max_seq_len / high_freq_factor are kept, those between are
    blended. Source: llama_models/llama3/model.py, apply_scaling.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_seq_len: int


@dataclass(frozen=True, kw_only=True)
class DecoderArgs:
    """A decoder-only transformer; `dim` and `ffn_dim` in features, lengths in tokens.

    The choices that have a default are Llama's; [model] documents them.
    """

    causal: ClassVar[bool] = True
    """A token attends only to itself and earlier tokens."""
    dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    ffn_dim: int
    vocab_size: int
    max_seq_len: int
    head_dim: int | None = None
    """None: dim / num_heads; `head_size` is the resolved value."""
    ffn: FFNKind = "swiglu"
    norm: NormKind = "rmsnorm"
    norm_eps: float = 1e-5
    qkv_bias: bool = False
    out_bias: bool = False
    ffn_bias: bool = False
    qk_norm: bool = False
    parallel_residual: bool = False
    positions: PositionKind = "rotary"
    rotary_fraction: float = 1.0
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    fp32_residual: bool = False
    """The residual stream is float32, whatever the dtype of the blocks."""
    hidden_dropout: float = 0.0
    """Dropout of embeddings, and of the outputs of attention and feed-forward."""
    attention_dropout: float = 0.0
    """Dropout of the attention weights."""
    tied_head: bool = False
    """The output projection multiplies by the embedding table."""

    def of_block(self, index: int) -> "DecoderArgs":
        """Returns the args of one block."""
        return self

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and of the head; those after vocab_size stay zero."""
        return pad_vocab_size(self.vocab_size)

    @property
    def has_dropout(self) -> bool:
        """True if the model has any dropout."""
        return max(self.hidden_dropout, self.attention_dropout) > 0

    @property
    def head_size(self) -> int:
        """Features of one attention head."""
        return self.head_dim or self.dim // self.num_heads

    @property
    def rotary_dim(self) -> int:
        """Features of a head that are rotated."""
        return int(self.head_size * self.rotary_fraction)

    @property
    def attention_dim(self) -> int:
        """Features of all query heads."""
        return self.num_heads * self.head_size

    @property
    def kv_dim(self) -> int:
        """Features of all key heads, or of all value heads."""
        return self.num_kv_heads * self.head_size


@dataclass(frozen=True, kw_only=True)
class MoEArgs(DecoderArgs):
    """A decoder whose feed-forwards are experts, each `ffn_dim` wide."""

    num_experts: int
    """Experts of a block."""
    top_k: int
    """Experts of a token."""
    route_norm: bool = True
    """The weights of a token's experts are divided by their sum."""
    balance_loss: BalanceKind = "none"
    balance_coeff: float = 1e-3
    z_loss_coeff: float = 0.0
    route_bias: bool = False
    """A bias without gradient is added to the scores for the choice of experts."""
    bias_rate: float = 0.0
    """Change of the bias per step."""
    score: ScoreKind = "softmax"
    """Scores of the experts: softmax of the logits, or sigmoid of each."""
    groups: int = 1
    """Number of equal groups of consecutive experts. A token goes to the groups with the largest
    sums of their two best scores."""
    kept_groups: int = 1
    """Number of groups that a token goes to."""
    route_scale: float = 1.0
    """Factor of the weights of a token's experts."""
    shared_experts: int = 0
    """Experts that every token uses, in addition to those that the router chooses."""
    dense_layers: int = 0
    """Number of first blocks with a dense feed-forward instead of experts."""
    dense_dim: int = 0
    """Width of the dense feed-forwards."""

    def of_block(self, index: int) -> DecoderArgs:
        """Returns the args of one block; a dense one has no experts."""
        if index >= self.dense_layers:
            return self
        return replace(self, num_experts=0, ffn_dim=self.dense_dim)


@dataclass(frozen=True, kw_only=True)
class LatentArgs(MoEArgs):
    """Multi-head latent attention: keys and values are projected from a narrow vector.

    Each query and key has nope_dim features that are not rotated, and rope_dim that are.
    """

    q_rank: int | None = None
    """Width of the vector from which queries are projected; None: that of the model."""
    kv_rank: int
    """Width of the vector from which keys and values are projected."""
    nope_dim: int
    rope_dim: int
    v_dim: int
    """Features of a value."""

    @property
    def head_size(self) -> int:
        """Features of one query or key."""
        return self.nope_dim + self.rope_dim

    @property
    def rotary_dim(self) -> int:
        """Features of a head that are rotated."""
        return self.rope_dim

    @property
    def attention_dim(self) -> int:
        """Features of all heads, the mean of queries and values, for the FLOPs of attention."""
        return self.num_heads * (self.head_size + self.v_dim) // 2

    @property
    def kv_dim(self) -> int:
        """Features of all heads, the mean of keys and values."""
        return self.attention_dim


@dataclass(frozen=True, kw_only=True)
class EncoderArgs(DecoderArgs):
    """A bidirectional encoder of pairs of texts, after BERT (arXiv:1810.04805)."""

    causal: ClassVar[bool] = False
    num_token_types: int = 2
    """Rows of the embedding of token types (first or second text of a pair)."""
    post_norm: bool = False
    """True for the original BERT: norms follow each sum, the embeddings are normalized, and there
    is not a final norm. False: blocks are those of a decoder."""
