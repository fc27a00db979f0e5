"""Logits and gradients against Hugging Face transformers' Llama on the same random weights."""

from dataclasses import replace

import pytest
import torch

from titan_lite.models.args import DecoderArgs, RopeScaling
from titan_lite.models.hf_config import hf_config_from_args
from titan_lite.models.llama import LLAMA
from titan_lite.models.patterns import translate
from titan_lite.nn.build import build_decoder

transformers = pytest.importorskip("transformers")

MHA = DecoderArgs(
    dim=64,
    num_layers=3,
    num_heads=4,
    num_kv_heads=4,
    ffn_dim=96,
    vocab_size=160,
    max_seq_len=128,
    rope_theta=10_000.0,
    norm_eps=1e-5,
)
# A short original length, so that kept, blended and stretched frequencies all occur.
SCALING = RopeScaling(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=48
)
CASES = {
    "mha": MHA,
    "gqa": replace(MHA, num_kv_heads=2),
    "tied head": replace(MHA, tied_head=True),
    "one kv head": replace(MHA, num_kv_heads=1),
    "theta and eps": replace(MHA, rope_theta=500_000.0, norm_eps=1e-3),
    "scaled rope": replace(MHA, num_kv_heads=2, rope_theta=500_000.0, rope_scaling=SCALING),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_and_every_gradient_equal_hugging_face(case: str) -> None:
    args = CASES[case]
    torch.manual_seed(0)
    ours = build_decoder(args)
    # Larger than at init, so that attention is far from uniform and norms matter.
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    assert LLAMA.hf_config is not None
    # What we write to config.json is what describes the model to them.
    config = hf_config_from_args(args, LLAMA.hf_config, dtype="float32")
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**config, attn_implementation="eager")
    )
    theirs.load_state_dict(
        {translate(name, LLAMA.hf_key_map): value for name, value in ours.state_dict().items()}
    )
    tokens = torch.randint(args.vocab_size, (2, 100))
    cotangent = torch.randn(2, 100, args.vocab_size)

    logits = ours(tokens)
    expected = theirs(input_ids=tokens).logits
    (logits * cotangent).mean().backward()
    (expected * cotangent).mean().backward()

    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    their_gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        reference = their_gradients.pop(translate(name, LLAMA.hf_key_map))
        assert parameter.grad is not None
        error = (parameter.grad - reference).abs().max() / reference.abs().max()
        assert error <= 1e-5, f"{name}: relative error {error:.1e}"
    assert not their_gradients


def test_the_scaled_case_keeps_blends_and_stretches_frequencies() -> None:
    plain = CASES["scaled rope"].rope_theta ** -(torch.arange(0, 16, 2) / 16)
    # The angle at position 1 is the frequency itself, below pi for all.
    rope = build_decoder(CASES["scaled rope"]).rope
    ratio = plain / torch.atan2(rope.sin_SF[1], rope.cos_SF[1])
    assert ratio[0] == pytest.approx(1.0)
    assert ratio[-1] == pytest.approx(8.0, rel=1e-4)
    assert ((ratio > 1.01) & (ratio < 7.99)).any()
