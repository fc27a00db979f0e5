"""Looking up families and flavors, and registering others."""

from dataclasses import dataclass, replace

import pytest

from titan_lite.config.problems import SettingError
from titan_lite.config.schema import Model
from titan_lite.models import registry
from titan_lite.models.llama import LLAMA
from titan_lite.models.moe import MIXTRAL
from titan_lite.models.registry import families, register, resolve


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry._FAMILIES, "data", dict(registry._FAMILIES))


def test_the_default_section_is_the_debug_llama() -> None:
    family, args = resolve(Model())
    assert family is LLAMA
    assert args == LLAMA.flavors["debug"]


def test_each_override_replaces_its_field_and_nothing_else() -> None:
    flavor = LLAMA.flavors["llama3.1_8b"]
    given = {
        "dim": 128,
        "num_layers": 2,
        "num_heads": 8,
        "num_kv_heads": 1,
        "ffn_dim": 64,
        "vocab_size": 512,
        "max_seq_len": 32,
        "rope_theta": 7.0,
        "norm_eps": 0.5,
        "tied_head": True,
        "fp32_residual": True,
        "head_dim": 32,
        "ffn": "gelu",
        "norm": "layernorm",
        "qkv_bias": True,
        "out_bias": True,
        "ffn_bias": True,
        "qk_norm": True,
        "parallel_residual": True,
        "positions": "learned",
        "rotary_fraction": 0.5,
        "hidden_dropout": 0.25,
        "attention_dropout": 0.75,
    }
    of_experts = {"num_experts": 4, "top_k": 1, "route_norm": False}
    of_experts |= {"balance_loss": "sequence", "balance_coeff": 0.5, "z_loss_coeff": 0.25}
    of_experts |= {"route_bias": True, "bias_rate": 0.125}
    overridable = Model.model_fields.keys() - {"name", "flavor"}
    assert given.keys() | of_experts.keys() == overridable
    for key, value in given.items():
        _, args = resolve(Model(flavor="llama3.1_8b", **{key: value}))
        assert args == replace(flavor, **{key: value})
    for key, value in of_experts.items():
        _, args = resolve(Model(name="mixtral", **{key: value}))
        assert args == replace(MIXTRAL.flavors["debug"], **{key: value})


def test_an_unknown_family_names_the_nearest_and_all() -> None:
    with pytest.raises(SettingError) as error:
        resolve(Model(name="lama"))
    assert str(error.value) == (
        'model.name: unknown family "lama"; did you mean "llama"? '
        "(known: bert, deepseek_v3, gpt, gpt_neox, internlm, llama, megatron_bert, mixtral, qwen, "
        "qwen2.5, qwen3, qwen3_moe)"
    )


def test_an_unknown_flavor_names_the_nearest_and_all() -> None:
    with pytest.raises(SettingError, match='unknown flavor "llama3_8B"; did you mean "llama3_8b"'):
        resolve(Model(flavor="llama3_8B"))


def test_an_override_that_the_family_lacks_is_refused_with_what_it_has() -> None:
    @dataclass(frozen=True)
    class Args:
        dim: int
        depth: int

    register(replace(LLAMA, name="other", flavors={"small": Args(8, 2)}))
    assert resolve(Model(name="other", flavor="small", dim=16))[1] == Args(16, 2)
    with pytest.raises(SettingError) as error:
        resolve(Model(name="other", flavor="small", rope_theta=1.0))
    assert error.value.keys[0] == "model.rope_theta"
    assert error.value.message == 'family "other" has no rope_theta; it has dim, depth'


def test_a_name_is_registered_once_but_again_with_the_same_content() -> None:
    mine = replace(LLAMA, name="mine")
    register(mine)
    register(replace(mine))
    assert families()["mine"] == mine
    with pytest.raises(ValueError, match='already registered as "mine"; choose another name'):
        register(replace(mine, flavors={}))
