"""config.json of Hugging Face transformers, from a family's args and back."""

import re
from dataclasses import replace
from typing import Any

import pytest

from titan_lite.models.args import DecoderArgs
from titan_lite.models.family import Family
from titan_lite.models.hf_config import (
    HFConfig,
    args_from_hf,
    hf_config_from_args,
    hf_differences,
    unsupported_in_hf,
)
from titan_lite.models.llama import LLAMA
from titan_lite.models.registry import families, family_of

assert LLAMA.hf_config is not None
HF: HFConfig = LLAMA.hf_config
SCALED = LLAMA.flavors["llama3.1_8b"]


def config(**changes: Any) -> dict[str, Any]:
    """Llama 3.1 8B's, with changes; a change to None leaves the key out."""
    written = hf_config_from_args(SCALED, HF, dtype="bfloat16", bos_id=1, eos_id=2) | changes
    return {key: value for key, value in written.items() if value is not None}


FLAVORS = [
    pytest.param(family, args, id=f"{family.name}-{flavor}")
    for family in families().values()
    if family.hf_config is not None
    for flavor, args in family.flavors.items()
]


@pytest.mark.parametrize(("family", "args"), FLAVORS)
def test_every_flavor_survives_the_way_there_and_back(family: Family, args: DecoderArgs) -> None:
    assert family.hf_config is not None
    written = hf_config_from_args(args, family.hf_config, dtype="float32")
    # InternLM without biases is a Llama.
    is_llama = family.name == "internlm" and not args.qkv_bias
    assert family_of(written, families()) is (LLAMA if is_llama else family)
    read = args_from_hf(written, family.hf_config)
    assert replace(read, head_dim=args.head_dim) == args
    assert read.head_size == args.head_size
    assert hf_differences(written, family.hf_config, args) == {}
    assert not unsupported_in_hf(args, family.hf_config)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"qk_norm": True}, "LlamaForCausalLM does not support qk_norm True (only False)"),
        (
            "internlm",
            {"out_bias": False},
            "LlamaForCausalLM does not support qkv_bias True (only False)",
        ),
        ("gpt", {"head_dim": 64}, "GPT2LMHeadModel does not support head_dim 64 (only 32)"),
        ("gpt", {"ffn": "gelu"}, "GPT2LMHeadModel does not support ffn gelu (only gelu_tanh)"),
    ],
)
def test_a_form_that_the_class_has_not_is_named(
    name: str, changes: dict[str, Any], message: str
) -> None:
    family = families()[name]
    assert family.hf_config is not None
    args = replace(family.flavors["debug"], **changes)
    assert unsupported_in_hf(args, family.hf_config) == message


@pytest.mark.parametrize(
    ("flavor", "published", "different"),
    [
        # huggingface.co/internlm/internlm-7b, which was trained with an epsilon of 1e-5.
        ("7b", {"bias": True}, {"norm_eps": (1e-6, 1e-5)}),
        # huggingface.co/internlm/internlm-20b
        (
            "20b",
            {
                "bias": False,
                "hidden_size": 5120,
                "intermediate_size": 13824,
                "max_position_embeddings": 4096,
                "num_attention_heads": 40,
                "num_hidden_layers": 60,
                "num_key_value_heads": 40,
            },
            {},
        ),
    ],
)
def test_internlms_own_files_are_read(
    flavor: str, published: dict[str, Any], different: dict[str, Any]
) -> None:
    written = {
        "architectures": ["InternLMForCausalLM"],
        "model_type": "internlm",
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "max_position_embeddings": 2048,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "rms_norm_eps": 1e-06,
        "tie_word_embeddings": False,
        "vocab_size": 103168,
    } | published
    family = families()["internlm"]
    assert family_of(written, families()) is family
    assert family.hf_config is not None
    assert hf_differences(written, family.hf_config, family.flavors[flavor]) == different


def test_an_activation_that_no_feed_forward_here_has_is_named() -> None:
    family = families()["gpt_neox"]
    assert family.hf_config is not None
    written = hf_config_from_args(family.flavors["20b"], family.hf_config, dtype="float16")
    assert written["hidden_act"] == "gelu_fast"
    with pytest.raises(ValueError, match="hidden_act = 'relu' is not supported; titan_lite's GPT"):
        args_from_hf(written | {"hidden_act": "relu"}, family.hf_config)


def test_transformers_default_of_gpt_neox_is_the_20b_but_for_its_activation() -> None:
    transformers = pytest.importorskip("transformers")
    written = transformers.GPTNeoXConfig(architectures=["GPTNeoXForCausalLM"]).to_dict()
    family = family_of(written, families())
    assert family.hf_config is not None
    expected = replace(families()["gpt_neox"].flavors["20b"], ffn="gelu")
    assert args_from_hf(written, family.hf_config) == expected


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
    assert args_from_hf(config(head_dim=96), HF).head_size == 96


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": None}, "config.json has no hidden_size"),
        (
            {"attention_bias": True},
            "attention_bias = True is not supported; titan_lite's LlamaForCausalLM requires False",
        ),
        (
            {"hidden_act": "gelu"},
            "hidden_act = 'gelu' is not supported; titan_lite's LlamaForCausalLM requires 'silu'",
        ),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling is of type 'linear'; only \"llama3\""),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling lacks low_freq"),
    ],
)
def test_what_cannot_be_run_here_is_refused_by_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        args_from_hf(config(**changes), HF)


@pytest.mark.parametrize("architectures", [["GemmaForCausalLM"], None])
def test_an_architecture_that_no_family_has_is_named(architectures: list[str] | None) -> None:
    with pytest.raises(ValueError, match=r"no model family supports architectures \[.*known: "):
        family_of(config(architectures=architectures), families())


def test_a_users_family_of_the_same_architecture_does_not_take_the_first_ones_place() -> None:
    mine = replace(LLAMA, name="mine")
    other = replace(LLAMA, name="other", hf_config=None)
    assert family_of(config(), {"other": other, "llama": LLAMA, "mine": mine}) is LLAMA


def test_differences_name_what_shapes_cannot_show() -> None:
    args = replace(SCALED, num_heads=64, rope_theta=1e6, max_seq_len=512)
    assert hf_differences(config(), HF, args) == {
        "num_heads": (32, 64),
        "head_dim": (128, 64),
        "rope_theta": (5e5, 1e6),
    }
