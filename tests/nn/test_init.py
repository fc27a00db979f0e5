"""How parameters are drawn."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from titan_lite.models.family import Family
from titan_lite.models.gpt import GPT
from titan_lite.models.llama import LLAMA
from titan_lite.models.qwen import QWEN2_5
from titan_lite.nn.build_model import build_model
from titan_lite.nn.decoder import Decoder
from titan_lite.nn.init import DECODER_RULES, InitRule, fill, linear

# Standard deviation of a normal cut at 3 standard deviations.
CUT = 0.98658


@pytest.fixture(scope="module")
def model() -> Decoder:
    with torch.device("meta"):
        return Decoder(replace(LLAMA.flavors["debug"], num_layers=8))


def drawn(model: Decoder, name: str, seed: int = 0) -> Tensor:
    tensor = torch.full(model.get_parameter(name).shape, torch.nan)
    model.init_parameter(name, tensor, torch.Generator().manual_seed(seed))
    return tensor


@pytest.mark.parametrize(
    ("name", "std", "is_cut"),
    [
        ("tok_embeddings.weight", 1.0, False),
        ("layers.0.attention.wq.weight", 0.02, True),
        ("layers.7.attention.wk.weight", 0.02, True),
        ("layers.3.attention.wv.weight", 0.02, True),
        ("layers.0.attention.wo.weight", 0.02 / 2**0.5, True),
        ("layers.7.attention.wo.weight", 0.02 / 16**0.5, True),
        ("layers.5.feed_forward.w1.weight", 0.02, True),
        ("layers.5.feed_forward.w3.weight", 0.02, True),
        ("layers.5.feed_forward.w2.weight", 0.02 / 12**0.5, True),
        ("output.weight", 256**-0.5, True),
    ],
)
def test_weights_have_the_standard_deviation_of_their_kind(
    model: Decoder, name: str, std: float, is_cut: bool
) -> None:
    tensor = drawn(model, name)
    assert tensor.std().item() == pytest.approx(std * (CUT if is_cut else 1.0), rel=0.02)
    assert abs(tensor.mean().item()) < 0.02 * std
    assert (tensor.abs().max() <= 3 * std * (1 + 1e-6)).item() == is_cut


@pytest.mark.parametrize(
    "name", ["norm.weight", "layers.2.attention_norm.weight", "layers.2.ffn_norm.weight"]
)
def test_norms_are_ones(model: Decoder, name: str) -> None:
    assert (drawn(model, name) == 1).all()


def test_the_same_generator_seed_gives_the_same_tensor(model: Decoder) -> None:
    for name, _ in model.named_parameters():
        assert torch.equal(drawn(model, name, seed=3), drawn(model, name, seed=3))
        assert "norm" in name or not torch.equal(drawn(model, name, 3), drawn(model, name, 4))


@pytest.mark.parametrize("family", [LLAMA, QWEN2_5, GPT], ids=lambda family: family.name)
def test_the_first_loss_is_hardly_above_that_of_even_chances(family: Family) -> None:
    """A tied head drawn like others has tokens predict themselves: Qwen 2.5 starts at 13.5."""
    model = build_model(family, family.flavors["debug"])
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        model.init_parameter(name, parameter, generator)
    tokens = torch.randint(2048, (2, 128), generator=generator)
    with torch.no_grad():
        loss = cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    assert math.log(2048) < loss < math.log(2048) + (0.1 if model.tied_head else 0.6)


def test_the_global_generator_is_neither_read_nor_moved(model: Decoder) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = drawn(model, "output.weight")
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(drawn(model, "output.weight"), first)


def test_a_parameter_without_exactly_one_rule_is_named() -> None:
    with pytest.raises(ValueError, match=r"'output\.bias' is matched by 0 init rules, not one"):
        fill(DECODER_RULES, "output.bias", torch.empty(2), torch.Generator())
    rules = (*DECODER_RULES, InitRule("output.*", linear))
    with pytest.raises(ValueError, match=r"'output\.weight' is matched by 2 init rules, not one"):
        fill(rules, "output.weight", torch.empty(2, 2), torch.Generator())
