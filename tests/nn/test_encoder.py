"""The encoder's logits, losses and gradients against Hugging Face transformers."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from tests.nn.test_hf_parity import SMALL, assert_same_gradients, build_hf_model, give_weights
from titan_lite.checkpoint.hf_layout import HFModel
from titan_lite.models.args import EncoderArgs
from titan_lite.models.bert import BERT, MEGATRON_BERT
from titan_lite.models.family import Family
from titan_lite.nn.document_attention import dense_mask
from titan_lite.nn.encoder import Encoder
from titan_lite.nn.token_context import TokenContext

FAMILIES = pytest.mark.parametrize("family", [BERT, MEGATRON_BERT], ids=lambda family: family.name)
B, S = 3, 100


def small(family: Family) -> EncoderArgs:
    args = family.flavors["debug"]
    assert isinstance(args, EncoderArgs)
    return replace(args, **SMALL)


def drawn(args: EncoderArgs) -> Encoder:
    """Larger than at init, so that attention is far from uniform and norms and biases matter."""
    torch.manual_seed(0)
    model = Encoder(args)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.1)
        if name.endswith("norm.weight"):
            parameter.data.add_(1)
    return model


def pairs(vocab_size: int) -> dict[str, Tensor]:
    """Rows of two texts and padding, every seventh token with a label."""
    torch.manual_seed(1)
    lengths = torch.tensor([S, 73, 31])
    padding = torch.arange(S) >= lengths[:, None]
    # Transformers gives token 0, its padding, no gradient.
    tokens = torch.randint(1, vocab_size, (B, S)).masked_fill(padding, 0)
    labels = torch.randint(vocab_size, (B, S))
    labels[:, torch.arange(S) % 7 != 3] = -100
    second = (torch.arange(S) >= lengths[:, None] // 3) & ~padding
    return {
        "tokens": tokens,
        "types": second.long(),
        "padding": padding.long(),
        "labels": labels.masked_fill(padding, -100),
        "pair_labels": torch.tensor([0, 1, 1]),
    }


@FAMILIES
def test_logits_losses_and_every_gradient_equal_hugging_face(family: Family) -> None:
    args = small(family)
    model, hf = drawn(args), HFModel.of(family, args)
    hf_model: Any = build_hf_model(args, family)
    hf_parameters = dict(hf_model.named_parameters())
    give_weights(hf, model, hf_parameters)
    batch = pairs(args.vocab_size)
    valid = (batch["labels"] != -100).sum()
    seen: dict[str, Tensor] = {}

    def head_loss(hidden_BSD: Tensor, weight_VD: Tensor, bias_V: Tensor) -> Tensor:
        seen["logits"] = (hidden_BSD @ weight_VD.T + bias_V)[..., : args.vocab_size]
        sum_of_all = cross_entropy(
            seen["logits"].flatten(0, 1), batch["labels"].flatten(), reduction="sum"
        )
        return sum_of_all / valid

    def pair_loss(logits_B2: Tensor) -> Tensor:
        seen["pair_logits"] = logits_B2
        return cross_entropy(logits_B2, batch["pair_labels"], reduction="sum") / B

    mask = dense_mask(batch["padding"], torch.arange(S), torch.float32, causal=False)
    inputs = {"context": TokenContext(mask=mask, token_types_BS=batch["types"])}
    loss = model(batch["tokens"], head_loss, pair_loss=pair_loss, **inputs)
    expected = hf_model(
        input_ids=batch["tokens"],
        attention_mask=1 - batch["padding"],
        token_type_ids=batch["types"],
        labels=batch["labels"],
        next_sentence_label=batch["pair_labels"],
    )
    loss.backward()
    expected.loss.backward()

    assert loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    text = batch["padding"] == 0
    for logits, reference in (
        (seen["logits"][text], expected.prediction_logits[text]),
        (seen["pair_logits"], expected.seq_relationship_logits),
        (model(batch["tokens"], **inputs)[text], expected.prediction_logits[text]),
    ):
        assert (logits - reference).abs().max() <= 1e-5 * reference.abs().max()
    gradients = {name: p.grad for name, p in hf_parameters.items() if p.grad is not None}
    assert_same_gradients(hf, model, gradients)


@FAMILIES
def test_without_a_mask_every_token_sees_all_others(family: Family) -> None:
    args = small(family)
    model = drawn(args)
    tokens = pairs(args.vocab_size)["tokens"][:1]
    changed = tokens.clone()
    changed[0, -1] = tokens[0, -1] % (args.vocab_size - 1) + 1
    difference = (model(tokens) - model(changed)).abs().amax(-1)[0]
    assert (difference > 1e-4).all()


def test_a_pair_loss_is_added_to_the_heads_and_may_be_left_out() -> None:
    model = drawn(small(MEGATRON_BERT))
    tokens = pairs(model.vocab_size)["tokens"]

    def head_loss(hidden_BSD: Tensor, _weight_VD: Tensor, bias_V: Tensor) -> Tensor:
        return hidden_BSD.sum() + bias_V.sum()

    head = model(tokens, head_loss)
    head.backward()
    assert model.pair_head is not None
    assert all(p.grad is None for p in model.pair_head.parameters())
    seen = []

    def pair_loss(logits_B2: Tensor) -> Tensor:
        seen.append(logits_B2.sum())
        return seen[0]

    both = model(tokens, head_loss, pair_loss=pair_loss)
    both.backward()
    assert torch.equal(both, head + seen[0])
    assert all(p.grad is not None and p.grad.any() for p in model.pair_head.parameters())


def test_all_tokens_are_of_the_first_text_unless_told() -> None:
    model = drawn(small(BERT))
    tokens = pairs(model.vocab_size)["tokens"]
    first = model(tokens)
    zeros, ones = (TokenContext(token_types_BS=torch.full_like(tokens, kind)) for kind in (0, 1))
    assert torch.equal(first, model(tokens, context=zeros))
    assert not torch.allclose(first, model(tokens, context=ones))
