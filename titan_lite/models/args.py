"""The numbers that define one decoder: sizes, rotary embedding, normalisation."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3.1's stretching of the low rotary frequencies.

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
    """Sizes of a decoder-only transformer; `dim` and `ffn_dim` in features, lengths in tokens."""

    dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    ffn_dim: int
    vocab_size: int
    max_seq_len: int
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    fp32_residual: bool = False
    """Blocks add to a residual stream in float32, whatever they compute in."""
    tied_head: bool = False
    """The output projection multiplies by the embedding table."""
    vocab_multiple: int = 1
    """Embedding and head have rows up to a multiple of this; those past vocab_size are zero."""

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and of the head."""
        return math.ceil(self.vocab_size / self.vocab_multiple) * self.vocab_multiple

    @property
    def head_dim(self) -> int:
        """Features of one attention head."""
        return self.dim // self.num_heads
