"""Initializes each parameter by a rule for its name.

The scheme is torchtitan's (torchtitan/models/llama3/model/model.py, init_weights), with two
differences. Every normal is cut at 3 standard deviations; torchtitan cuts at +-2 absolute, where
one value in 2^24 is exactly the bound, 100 deviations out. And in the feed-forward only w2, which
writes to the residual stream, is scaled with depth.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from titan_lite.models.patterns import matches

# Prefix that activation checkpointing inserts into module names.
CHECKPOINT_PREFIX = "_checkpoint_wrapped_module."

Fill = Callable[[Tensor, torch.Generator, int], None]
"""(whole parameter, generator, layer number or 0) -> fills the parameter in place."""


@dataclass(frozen=True)
class InitRule:
    """Parameters whose name matches `pattern` (see models/patterns.py) are drawn by `fill`."""

    pattern: str
    fill: Fill


def ones(tensor: Tensor, generator: torch.Generator, layer: int) -> None:
    """Scales of norms."""
    nn.init.ones_(tensor)


def zeros(tensor: Tensor, generator: torch.Generator, layer: int) -> None:
    """Biases."""
    nn.init.zeros_(tensor)


def unit_normal(tensor: Tensor, generator: torch.Generator, layer: int) -> None:
    """Embedding tables: std 1."""
    nn.init.normal_(tensor, generator=generator)


def linear(tensor: Tensor, generator: torch.Generator, layer: int) -> None:
    """Inner projections: std 0.02."""
    _trunc_normal(tensor, 0.02, generator)


def residual(tensor: Tensor, generator: torch.Generator, layer: int) -> None:
    """Projections into the residual stream: std 0.02 / sqrt(2 * (layer + 1)).

    The stream's variance then grows with the logarithm of the depth.
    """
    _trunc_normal(tensor, 0.02 / (2 * (layer + 1)) ** 0.5, generator)


def head(tensor: Tensor, generator: torch.Generator, layer: int) -> None:
    """Output projection (V, D): std D ** -0.5, so that first logits have variance near 1."""
    _trunc_normal(tensor, tensor.shape[1] ** -0.5, generator)


DECODER_RULES = (
    InitRule("tok_embeddings.weight", unit_normal),
    InitRule("pos_embeddings.weight", unit_normal),
    InitRule("layers.*.attention_norm.weight", ones),
    InitRule("layers.*.attention.*_norm.weight", ones),
    InitRule("layers.*.attention.w[qkv].weight", linear),
    InitRule("layers.*.attention.w*_[ab].weight", linear),
    InitRule("layers.*.attention.wo.weight", residual),
    InitRule("layers.*.ffn_norm.weight", ones),
    InitRule("layers.*.feed_forward.w[13].weight", linear),
    InitRule("layers.*.feed_forward.w2.weight", residual),
    InitRule("layers.*.feed_forward.shared.w[13].weight", linear),
    InitRule("layers.*.feed_forward.shared.w2.weight", residual),
    InitRule("layers.*.feed_forward.router.weight", linear),
    InitRule("layers.*.feed_forward.experts.w[13]", linear),
    InitRule("layers.*.feed_forward.experts.w2", residual),
    InitRule("layers.*.*.bias", zeros),
    InitRule("layers.*.*.*.bias", zeros),
    InitRule("norm.weight", ones),
    InitRule("norm.bias", zeros),
    InitRule("output.weight", head),
)

ENCODER_RULES = (
    InitRule("tok_embeddings.weight", linear),
    InitRule("pos_embeddings.weight", linear),
    InitRule("type_embeddings.weight", linear),
    InitRule("embedding_norm.weight", ones),
    InitRule("embedding_norm.bias", zeros),
    *(rule for rule in DECODER_RULES if rule.pattern.startswith(("layers.", "norm."))),
    InitRule("transform.dense.weight", linear),
    InitRule("transform.norm.weight", ones),
    InitRule("transform.*.bias", zeros),
    # Also for a tied embedding.
    InitRule("output.weight", linear),
    InitRule("output.bias", zeros),
    InitRule("pair_head.*.weight", linear),
    InitRule("pair_head.*.bias", zeros),
)
"""BERT's std of 0.02 (arXiv:1810.04805), except for projections into the residual stream."""


def rule_of(rules: tuple[InitRule, ...], name: str) -> InitRule:
    """Returns the one rule that matches a parameter's name; ValueError if there is not one."""
    matching = [rule for rule in rules if matches(rule.pattern, name)]
    if len(matching) != 1:
        raise ValueError(
            f"parameter {name!r} is matched by {len(matching)} init rules, not one: give the model "
            "an init_rules row for it"
        )
    return matching[0]


@torch.no_grad()
def fill(
    rules: tuple[InitRule, ...], name: str, tensor: Tensor, generator: torch.Generator
) -> None:
    """Fills one whole parameter by the one rule that matches its name, else ValueError."""
    rule = rule_of(rules, name)
    layer = next((int(part) for part in name.split(".") if part.isdecimal()), 0)
    rule.fill(tensor, generator, layer)


def _trunc_normal(tensor: Tensor, std: float, generator: torch.Generator) -> None:
    """Draws a normal within 3 std, like nn.init.trunc_normal_ of torch 2.13 and later."""
    tensor.normal_(0, std, generator=generator)
    if tensor.is_meta:  # no values to cut
        return
    while (outside := tensor.abs() > 3 * std).any():
        again = torch.empty_like(tensor).normal_(0, std, generator=generator)
        tensor.copy_(torch.where(outside, again, tensor))
