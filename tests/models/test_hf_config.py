"""config.json of Hugging Face transformers, from a family's args and back."""

import re
from dataclasses import replace
from typing import Any

import pytest

from titan_lite.models.hf_config import (
    HFConfig,
    args_from_hf,
    differences,
    family_of,
    hf_config_from_args,
)
from titan_lite.models.llama import LLAMA
from titan_lite.models.registry import families

assert LLAMA.hf_config is not None
HF: HFConfig = LLAMA.hf_config
SCALED = LLAMA.flavors["llama3.1_8b"]


def config(**changes: Any) -> dict[str, Any]:
    """Llama 3.1 8B's, with changes; a change to None leaves the key out."""
    written = hf_config_from_args(SCALED, HF, dtype="bfloat16", bos_id=1, eos_id=2) | changes
    return {key: value for key, value in written.items() if value is not None}


@pytest.mark.parametrize("flavor", LLAMA.flavors)
def test_every_flavor_survives_the_way_there_and_back(flavor: str) -> None:
    args = LLAMA.flavors[flavor]
    written = hf_config_from_args(args, HF, dtype="float32")
    assert family_of(written, families()) is LLAMA
    assert args_from_hf(written, HF) == args
    assert differences(written, HF, args) == {}


def test_what_transformers_5_writes_of_the_rotary_embedding_is_read() -> None:
    rope = config()["rope_scaling"] | {"rope_theta": 5e5}
    assert args_from_hf(config(rope_theta=None, rope_scaling=None, rope_parameters=rope), HF) == (
        SCALED
    )
    rope = {"rope_theta": 7e5, "rope_type": "default"}
    args = args_from_hf(config(rope_theta=None, rope_scaling=None, rope_parameters=rope), HF)
    assert (args.rope_theta, args.rope_scaling) == (7e5, None)


def test_keys_left_out_have_the_values_that_transformers_takes() -> None:
    left_out = ("num_key_value_heads", "rms_norm_eps", "rope_theta", "tie_word_embeddings")
    args = args_from_hf(config(**dict.fromkeys(left_out), head_dim=None), HF)
    assert (args.num_kv_heads, args.norm_eps, args.rope_theta) == (32, 1e-6, 1e4)
    assert not args.tied_head


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": None}, "config.json has no hidden_size"),
        ({"attention_bias": True}, "attention_bias is True; LlamaForCausalLM here is built for Fa"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; LlamaForCausalLM here is built for 'silu'"),
        ({"head_dim": 96}, "head_dim is 96, and 128 is the only value that its other numbers"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling is of type 'linear'; only \"llama3\""),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling lacks low_freq"),
    ],
)
def test_what_cannot_be_run_here_is_refused_by_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        args_from_hf(config(**changes), HF)


@pytest.mark.parametrize("architectures", [["GemmaForCausalLM"], None])
def test_an_architecture_that_no_family_has_is_named(architectures: list[str] | None) -> None:
    with pytest.raises(ValueError, match=r"no model family here is of architectures \[.*known: "):
        family_of(config(architectures=architectures), families())


def test_a_users_family_of_the_same_architecture_does_not_take_the_first_ones_place() -> None:
    mine = replace(LLAMA, name="mine")
    other = replace(LLAMA, name="other", hf_config=None)
    assert family_of(config(), {"other": other, "llama": LLAMA, "mine": mine}) is LLAMA


def test_differences_name_what_shapes_cannot_show() -> None:
    args = replace(SCALED, num_heads=64, rope_theta=1e6, max_seq_len=512)
    assert differences(config(), HF, args) == {
        "num_heads": (32, 64),
        "head_dim": (128, 64),
        "rope_theta": (5e5, 1e6),
    }
