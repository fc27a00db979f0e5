"""Tensors of ours inside tensors of Hugging Face's: joined, split, and read in boxes."""

import itertools
from dataclasses import replace

import pytest
import torch

from titan_lite.checkpoint.hf_layout import HFModel
from titan_lite.models.args import DecoderArgs
from titan_lite.models.hf_config import HFLayout
from titan_lite.models.llama import LLAMA
from titan_lite.nn.decoder import Decoder

ARGS = DecoderArgs(
    dim=16, num_layers=1, num_heads=4, num_kv_heads=2, ffn_dim=24, vocab_size=5, max_seq_len=8
)
FUSED = "model.layers.*.qkv.weight"
WQ, WK, WV = (f"layers.0.attention.w{letter}.weight" for letter in "qkv")


def fused(layout: HFLayout, **changes: object) -> HFModel:
    """Llama with one tensor for q, k and v."""
    key_map = {
        local: FUSED if local in ("layers.*.attention.w" + part for part in QKV) else reference
        for local, reference in LLAMA.hf_key_map.items()
    }
    family = replace(LLAMA, hf_key_map=key_map, hf_layouts={FUSED: layout})
    return HFModel.of(family, replace(ARGS, **changes))


QKV = ("q.*", "k.*", "v.*")


def test_parts_follow_each_other_or_are_dealt_to_groups() -> None:
    weights = dict(Decoder(ARGS).named_parameters())
    q, k, v = (weights[name] for name in (WQ, WK, WV))
    plain = fused(HFLayout()).tensors["model.layers.0.qkv.weight"]
    assert torch.equal(plain.join([q, k, v]), torch.cat([q, k, v]))
    # Two of the four query heads, of 4 rows each, go with each key and value head.
    per_head = fused(HFLayout(groups="num_kv_heads")).tensors["model.layers.0.qkv.weight"]
    expected = torch.cat([q[:8], k[:4], v[:4], q[8:], k[4:], v[4:]])
    assert torch.equal(per_head.join([q, k, v]), expected)


def test_neox_interleaves_q_k_and_v_head_by_head() -> None:
    """Splits as transformers' GPTNeoXAttention does: view(heads, 3 * head_dim), then chunk(3)."""
    args = replace(ARGS, num_kv_heads=4)
    weights = dict(Decoder(args).named_parameters())
    tensor = fused(HFLayout(groups="num_heads"), num_kv_heads=4).tensors[
        "model.layers.0.qkv.weight"
    ]
    joined = tensor.join([weights[name] for name in (WQ, WK, WV)])
    parts = joined.view(4, 3 * 4, 16).chunk(3, dim=1)
    for name, part in zip((WQ, WK, WV), parts, strict=True):
        assert torch.equal(part.flatten(0, 1), weights[name])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("groups", ["", "num_kv_heads"])
def test_every_box_of_a_part_is_read_from_the_whole(groups: str, transposed: bool) -> None:
    layout = HFLayout(groups=groups, transposed=transposed)
    tensor = fused(layout).tensors["model.layers.0.qkv.weight"]
    weights = dict(Decoder(ARGS).named_parameters())
    stored = tensor.join([weights[name] for name in tensor.parts]).detach()
    assert stored.shape == tensor.shape == ((16, 32) if transposed else (32, 16))
    for part in (WQ, WK, WV):
        whole = weights[part].detach()
        bounds = list(itertools.combinations(range(0, len(whole) + 1, 3), 2))
        for (first, last), columns in itertools.product(bounds, [(0, 16), (5, 9)]):
            lengths = (last - first, columns[1] - columns[0])
            box = tensor.read(stored, part, (first, columns[0]), lengths)
            assert torch.equal(box, whole[first:last, slice(*columns)]), (part, first, last)


def test_rows_that_pad_a_vocabulary_are_read_as_zero_and_not_written() -> None:
    tensor = HFModel.of(LLAMA, ARGS).tensors["lm_head.weight"]
    stored = torch.randn(5, 16)
    padded = torch.nn.functional.pad(stored, (0, 0, 0, 3))
    assert torch.equal(tensor.read(stored, "output.weight", (0, 0), (8, 16)), padded)
    assert torch.equal(tensor.read(stored, "output.weight", (4, 2), (4, 6)), padded[4:, 2:8])
    assert not tensor.read(stored, "output.weight", (6, 0), (2, 16)).any()
    assert torch.equal(tensor.join([padded]), stored)
