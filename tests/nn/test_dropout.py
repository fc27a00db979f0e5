"""Dropout: the share that is dropped, its independence, and the places where transformers drops."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed import Workers
from tests.nn.test_encoder import drawn, small
from tests.nn.test_hf_parity import SMALL, build_hf_model, joined, taken
from tests.runs import train
from titan_lite.checkpoint.hf_layout import HFModel
from titan_lite.models.bert import BERT, MEGATRON_BERT
from titan_lite.models.family import Family
from titan_lite.models.gpt import GPT
from titan_lite.nn.attention import DropoutAttention, ScaledDotProductAttention
from titan_lite.nn.decoder import Decoder
from titan_lite.nn.document_attention import dense_mask
from titan_lite.nn.dropout import Dropout, drop, hash32, token_keys
from titan_lite.nn.token_context import TokenContext

P = 0.1
B, S = 3, 50
KEYS_BS = token_keys(7, torch.arange(B), torch.arange(S))


def lowbias32(number: int) -> int:
    """The published function, on numbers without a sign."""
    number = (number ^ number >> 16) * 0x7FEB352D % 2**32
    number = (number ^ number >> 15) * 0x846CA68B % 2**32
    return number ^ number >> 16


def test_features_are_dropped_by_the_published_hash() -> None:
    numbers = [0, 1, 77, 2**15, 2**16 + 3, 2**31 - 1, 2**31, 2**32 - 5, 2**32 - 1]
    keys = torch.tensor(numbers).to(torch.int32)
    assert [number % 2**32 for number in hash32(keys).tolist()] == [*map(lowbias32, numbers)]
    for p in (0.01, P, 0.5, 0.9):
        hashes = [[lowbias32(n ^ lowbias32(feature)) for feature in range(64)] for n in numbers]
        expected = torch.tensor(hashes) < int(p * 2**32)
        assert torch.equal(drop(torch.ones(len(numbers), 64), keys, p) == 0, expected)
    sample, place = 3, 2**33 + 5
    expected = 0
    for number in (7, sample, place):
        expected = lowbias32(lowbias32(expected ^ number % 2**32) ^ number >> 32)
    key = token_keys(7, torch.tensor([sample]), torch.tensor([place]))
    assert (key.dtype, key.item() % 2**32) == (torch.int32, expected)


def test_scrambling_is_one_to_one_and_each_bit_changes_half_of_the_results() -> None:
    numbers = torch.cat((torch.arange(2**16), torch.arange(-(2**16), 0))).to(torch.int32)
    hashed = hash32(numbers)
    assert hashed.unique().numel() == numbers.numel()
    for bit in range(32):
        changed = hashed ^ hash32(numbers ^ torch.tensor(1 << bit).to(torch.int32))
        # 2^17 numbers of 32 bits: a half, and 10 standard deviations.
        share = sum(((changed >> place) & 1).double().mean().item() for place in range(32)) / 32
        assert share == pytest.approx(0.5, abs=0.03), f"bit {bit}"


def test_keys_follow_from_all_of_seed_sample_and_place() -> None:
    numbers = (0, 1, 2**31, 2**32, 2**33, 2**40 + 1)
    combinations = {
        token_keys(seed, torch.tensor([sample]), torch.tensor([place])).item()
        for seed, sample, place in itertools.product(numbers, repeat=3)
    }
    # Equal ones by chance: 216^2 / 2^33.
    assert len(combinations) == len(numbers) ** 3


def dropped(keys: Tensor) -> Tensor:
    return drop(torch.ones(*keys.shape, 256), keys, P) == 0


@pytest.mark.parametrize("p", [0.01, P, 0.5])
def test_a_share_p_of_the_features_is_dropped_and_the_others_make_up_for_it(p: float) -> None:
    keys = token_keys(0, torch.arange(64), torch.arange(64))
    x = torch.rand(64, 64, 256) + 1
    out = drop(x, keys, p)
    share = (out == 0).double().mean().item()
    assert share == pytest.approx(p, abs=6 * (p * (1 - p) / x.numel()) ** 0.5)
    torch.testing.assert_close(out[out != 0], x[out != 0] / (1 - p))


def test_what_is_dropped_does_not_depend_on_what_is_dropped_elsewhere() -> None:
    numbers = torch.arange(64)
    keys = token_keys(0, numbers, numbers)
    whole = dropped(keys).double() - P
    others = {
        "the next feature": (whole[..., 1:], whole[..., :-1]),
        "the next token": (whole[:, 1:], whole[:, :-1]),
        "the next sample": (whole[1:], whole[:-1]),
    }
    for name, elsewhere in {
        "a later step": token_keys(0, numbers + 64, numbers),
        "another place in the block": hash32(keys ^ 1),
        "another seed": token_keys(1, numbers, numbers),
    }.items():
        others[name] = whole, dropped(elsewhere).double() - P
    for name, (a, b) in others.items():
        correlation = (a * b).mean().item() / (P * (1 - P))
        assert abs(correlation) < 6 / a.numel() ** 0.5, name
    # No row of 256 features comes twice among 4,096 tokens.
    assert whole.flatten(0, 1).unique(dim=0).shape[0] == 64 * 64


def test_parts_of_the_sequence_and_of_the_heads_drop_what_the_whole_does() -> None:
    torch.manual_seed(0)
    x_BSD = torch.randn(B, S, 64)
    whole = Dropout(P, salt=1)(x_BSD, KEYS_BS)
    parts = []
    for shard, part in enumerate(x_BSD.chunk(2, dim=1)):
        dropout = Dropout(P, salt=1)
        dropout.shard = shard
        parts.append(dropout(part, KEYS_BS))
    assert torch.equal(torch.cat(parts, dim=1), whole)

    heads = [torch.randn(B, 4, S, 16) for _ in range(3)]
    whole = DropoutAttention(P, salt=1, causal=True)(*heads, TokenContext(dropout_keys_BS=KEYS_BS))
    parts = []
    for shard, part in enumerate(zip(*(t.chunk(2, dim=1) for t in heads), strict=True)):
        attention = DropoutAttention(P, salt=1, causal=True)
        attention.shard = shard
        parts.append(attention(*part, TokenContext(dropout_keys_BS=KEYS_BS)))
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("num_kv_heads", [4, 2])
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "masked"])
def test_attention_whose_weights_are_hardly_dropped_is_the_fused_one(
    masked: bool, num_kv_heads: int
) -> None:
    torch.manual_seed(0)
    q = torch.randn(B, 4, S, 16)
    k, v = (torch.randn(B, num_kv_heads, S, 16) for _ in range(2))
    documents = (torch.arange(S) >= torch.tensor([[20], [30], [50]])).long()
    mask = dense_mask(documents, torch.arange(S), torch.float32) if masked else None
    context = TokenContext(mask=mask, dropout_keys_BS=KEYS_BS)
    # 2**-33 of them: none.
    got = DropoutAttention(2**-33, salt=1, causal=True)(q, k, v, context)
    expected = ScaledDotProductAttention(causal=True)(q, k, v, context)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_without_keys_nothing_is_dropped_and_with_them_other_steps_drop_other_things() -> None:
    args = replace(GPT.flavors["debug"], **SMALL, hidden_dropout=P, attention_dropout=P)
    model, without = Decoder(args), Decoder(replace(args, hidden_dropout=0.0))
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    without.load_state_dict(model.state_dict())
    tokens = torch.randint(args.vocab_size, (B, S))
    assert torch.equal(model(tokens), without(tokens))
    first, again = (model(tokens, context=TokenContext(dropout_keys_BS=KEYS_BS)) for _ in range(2))
    later_keys = token_keys(7, torch.arange(B, 2 * B), torch.arange(S))
    assert torch.equal(first, again)
    for other in (model(tokens), model(tokens, context=TokenContext(dropout_keys_BS=later_keys))):
        assert (first - other).abs().amax(-1).min() > 1e-3


@pytest.mark.distributed
def test_each_of_the_settings_acts_in_training(workers: dict[int, Workers], tmp_path: Path) -> None:
    losses = set()
    for number, setting in enumerate(
        ("hidden_dropout=0", "hidden_dropout=0.3", "attention_dropout=0.3")
    ):
        run = (tmp_path / str(number), "--training.steps=1", f"--model.{setting}")
        losses.add(workers[1].run(train, *run)[0][0]["loss"])
    assert len(losses) == 3


class DroppingAsHere:
    """Replaces torch.nn.functional.dropout, called by transformers' BERT in its order."""

    def __init__(self, num_heads: int) -> None:
        self.heads_N1 = torch.arange(num_heads, dtype=torch.int32)[:, None]
        self.calls = 0

    def __call__(self, x: Tensor, p: float, training: bool = True, inplace: bool = False) -> Tensor:
        assert (p, training, inplace) == (P, True, False)
        # After the embeddings; of a block: attention's weights, what attention adds, what the
        # feed-forward adds.
        number = self.calls
        self.calls += 1
        if number == 0:
            return drop(x, hash32(KEYS_BS ^ 0), p)
        block, place = divmod(number - 1, 3)
        keys_BS = hash32(hash32(KEYS_BS ^ (block + 1)) ^ (place + 1))
        if place == 0:
            return drop(x, hash32(keys_BS[:, None] ^ self.heads_N1), p)
        return drop(x, keys_BS, p)


@pytest.mark.parametrize("family", [BERT, MEGATRON_BERT], ids=lambda family: family.name)
def test_features_are_dropped_where_transformers_drops_them(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = replace(small(family), hidden_dropout=P, attention_dropout=P)
    model, hf = drawn(args), HFModel.of(family, args)
    hf_model: Any = build_hf_model(args, family)
    hf_model.set_attn_implementation("eager")
    hf_parameters = dict(hf_model.named_parameters())
    with torch.no_grad():
        for name, weight in joined(hf, model.state_dict()).items():
            hf_parameters[name].copy_(weight)
    for module in hf_model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = P
    dropping = DroppingAsHere(args.num_heads)
    tokens, weight_BSV = torch.randint(1, args.vocab_size, (B, S)), torch.randn(args.vocab_size)

    logits = model(tokens, context=TokenContext(dropout_keys_BS=KEYS_BS))
    (logits * weight_BSV).mean().backward()
    with monkeypatch.context() as patch:
        patch.setattr("torch.nn.functional.dropout", dropping)
        expected = hf_model.train()(input_ids=tokens).prediction_logits
    (expected * weight_BSV).mean().backward()

    assert dropping.calls == 1 + 3 * args.num_layers
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    hf_gradients = {n: p.grad for n, p in hf_parameters.items() if p.grad is not None}
    references = dict(taken(hf, hf_gradients, gradients))
    scale = max(reference.abs().max() for reference in references.values())
    for name, gradient in gradients.items():
        largest = scale if name.endswith("wk.bias") else references[name].abs().max()
        error = (gradient - references[name]).abs().max() / largest
        assert error <= 1e-5, f"{name}: relative error {error:.1e}"
