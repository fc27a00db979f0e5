"""Laws of every registered family, and the published sizes."""

from collections.abc import Iterator
from functools import lru_cache

import pytest
import torch
from torch import nn

from titan_lite.models.family import Family
from titan_lite.models.patterns import matches, translate
from titan_lite.models.registry import families
from titan_lite.models.roles import PlanRow
from titan_lite.nn.build_model import build_model
from titan_lite.nn.transformer import Transformer
from titan_lite.planner.counts import in_words, num_block_params, num_inactive_params, num_params

FLAVORS = [
    pytest.param(family, flavor, id=f"{family.name}-{flavor}")
    for family in families().values()
    for flavor in family.flavors
]
# Llama, InternLM, Qwen-14B, GPT, Megatron's BERT: counts that are published or follow from
# published layers and widths (GPT-NeoX's 16B: a guess of both); the others are those of
# transformers' classes.
PARAMETERS = {
    ("llama", "llama2_7b"): 6_738_415_616,
    ("llama", "llama2_13b"): 13_015_864_320,
    ("llama", "llama2_70b"): 68_976_648_192,
    ("llama", "llama3_8b"): 8_030_261_248,
    ("llama", "llama3_70b"): 70_553_706_496,
    ("llama", "llama3.1_8b"): 8_030_261_248,
    ("llama", "llama3.1_70b"): 70_553_706_496,
    ("llama", "llama3.1_405b"): 405_853_388_800,
    ("internlm", "7b"): 7_321_948_160,
    ("internlm", "20b"): 20_088_714_240,
    ("qwen", "14b"): 14_167_290_880,
    ("qwen2.5", "0.5b"): 494_032_768,
    ("qwen2.5", "1.5b"): 1_543_714_304,
    ("qwen2.5", "3b"): 3_085_938_688,
    ("qwen2.5", "7b"): 7_615_616_512,
    ("qwen2.5", "14b"): 14_770_033_664,
    ("qwen2.5", "32b"): 32_763_876_352,
    ("qwen2.5", "72b"): 72_706_203_648,
    ("qwen3", "0.6b"): 596_049_920,
    ("qwen3", "1.7b"): 1_720_574_976,
    ("qwen3", "4b"): 4_022_468_096,
    ("qwen3", "8b"): 8_190_735_360,
    ("qwen3", "14b"): 14_768_307_200,
    ("qwen3", "32b"): 32_762_123_264,
    ("qwen3_moe", "30b-a3b"): 30_532_122_624,
    ("qwen3_moe", "235b-a22b"): 235_093_634_560,
    ("mixtral", "8x7b"): 46_702_792_704,
    ("mixtral", "8x22b"): 140_630_071_296,
    ("deepseek_v3", "671b"): 671_026_404_352,
    ("deepseek_v3", "moonlight-16b-a3b"): 15_960_108_544,
    ("gpt_neox", "1.4b"): 1_435_739_040,
    ("gpt_neox", "16b"): 16_023_920_640,
    ("gpt_neox", "20b"): 20_554_567_680,
    ("gpt_neox", "175b"): 175_200_952_320,
    ("gpt_neox", "1t"): 1_009_297_049_600,
    ("gpt", "175b"): 174_615_846_912,
    ("gpt", "1t"): 1_008_038_758_400,
    ("bert", "base"): 110_106_428,
    ("bert", "large"): 336_226_108,
    ("megatron_bert", "base"): 137_030_658,
    ("megatron_bert", "large"): 372_113_922,
}
# Parameters of a token's experts and outside of experts; billions on the model cards.
ACTIVE = {
    ("qwen3_moe", "30b-a3b"): (3_353_032_704, 3.3),
    ("qwen3_moe", "235b-a22b"): (22_190_763_520, 22),
    ("mixtral", "8x7b"): (12_879_925_248, 12.9),
    ("mixtral", "8x22b"): (39_161_468_928, 39),
    ("deepseek_v3", "671b"): (37_552_282_624, 37),
    # Moonlight's published 2.24 billion exclude embedding and head.
    ("deepseek_v3", "moonlight-16b-a3b"): (2_914_774_528, 2.24 + 2 * 2048 * 163_840 / 1e9),
}
# Billions on the model cards: all parameters, and those of neither embedding nor head.
QWEN_CARDS = {
    ("qwen2.5", "0.5b"): (0.49, 0.36),
    ("qwen2.5", "1.5b"): (1.54, 1.31),
    ("qwen2.5", "3b"): (3.09, 2.77),
    ("qwen2.5", "7b"): (7.61, 6.53),
    ("qwen2.5", "14b"): (14.7, 13.1),
    ("qwen2.5", "32b"): (32.5, 31.0),
    ("qwen2.5", "72b"): (72.7, 70.0),
    ("qwen3", "0.6b"): (0.6, 0.44),
    ("qwen3", "1.7b"): (1.7, 1.4),
    ("qwen3", "4b"): (4.0, 3.6),
    ("qwen3", "8b"): (8.2, 6.95),
    ("qwen3", "14b"): (14.8, 13.2),
    ("qwen3", "32b"): (32.8, 31.2),
}


@lru_cache
def meta_model(family: str, flavor: str) -> Transformer:
    actual = families()[family]
    with torch.device("meta"):
        return build_model(actual, actual.flavors[flavor])


@pytest.mark.parametrize(("family", "flavor"), PARAMETERS)
def test_a_flavor_has_exactly_the_published_number_of_parameters(family: str, flavor: str) -> None:
    expected = PARAMETERS[family, flavor]
    assert meta_model(family, flavor).num_parameters == expected
    assert num_params(families()[family].flavors[flavor]) == expected


@pytest.mark.parametrize(("family", "flavor"), ACTIVE)
def test_a_mixture_of_experts_has_the_published_number_of_active_parameters(
    family: str, flavor: str
) -> None:
    expected, billions = ACTIVE[family, flavor]
    args = families()[family].flavors[flavor]
    assert num_params(args) - num_inactive_params(args) == expected
    assert expected / 1e9 == pytest.approx(billions, rel=0.02)
    model = meta_model(family, flavor)
    assert expected == sum(model.active(*named).numel() for named in model.named_parameters())
    words = f"{num_params(args):,} ({expected:,} active)"
    assert in_words(model.num_parameters, args) == words


def test_every_flavor_but_debug_has_a_size_to_be_tested_against() -> None:
    flavors = {(family.name, name) for family in families().values() for name in family.flavors}
    assert flavors - PARAMETERS.keys() == {(name, "debug") for name in families()}


@pytest.mark.parametrize(("family", "flavor"), QWEN_CARDS)
def test_qwen_is_as_large_as_its_model_card_says(family: str, flavor: str) -> None:
    args = families()[family].flavors[flavor]
    blocks = num_block_params(args) + args.dim
    assert (num_params(args) / 1e9, blocks / 1e9) == pytest.approx(
        QWEN_CARDS[family, flavor], rel=0.02
    )


@pytest.mark.parametrize(
    ("flavor", "theta", "max_seq_len", "factor", "heads", "kv_heads", "vocab"),
    [
        ("llama2_7b", 1e4, 4096, None, 32, 32, 32000),
        ("llama2_13b", 1e4, 4096, None, 40, 40, 32000),
        ("llama2_70b", 1e4, 4096, None, 64, 8, 32000),
        ("llama3_8b", 5e5, 8192, None, 32, 8, 128256),
        ("llama3_70b", 5e5, 8192, None, 64, 8, 128256),
        ("llama3.1_8b", 5e5, 131072, 8.0, 32, 8, 128256),
        ("llama3.1_70b", 5e5, 131072, 8.0, 64, 8, 128256),
        ("llama3.1_405b", 5e5, 131072, 8.0, 128, 8, 128256),
    ],
)
def test_llama_has_the_published_numbers_that_parameter_counts_cannot_see(
    flavor: str,
    theta: float,
    max_seq_len: int,
    factor: float | None,
    heads: int,
    kv_heads: int,
    vocab: int,
) -> None:
    args = families()["llama"].flavors[flavor]
    assert (args.rope_theta, args.max_seq_len, args.norm_eps) == (theta, max_seq_len, 1e-5)
    assert (args.num_heads, args.num_kv_heads, args.head_size) == (heads, kv_heads, 128)
    assert args.vocab_size == vocab
    assert (args.rope_scaling and args.rope_scaling.factor) == factor
    if args.rope_scaling is not None:
        assert args.rope_scaling.low_freq_factor == 1.0
        assert args.rope_scaling.high_freq_factor == 4.0
        assert args.rope_scaling.original_max_seq_len == 8192


def tp_plan_violations(model: nn.Module, plan: tuple[PlanRow, ...]) -> Iterator[str]:
    """Parameters not matched by exactly one row, and rows that match no module."""
    modules = [name for name, _ in model.named_modules()]
    for row in plan:
        if not any(row.matches(name) for name in modules):
            yield f"row {row.pattern!r} ({row.role}) matches nothing"
    for name, _ in model.named_parameters():
        rows = [row for row in plan if row.matches(name.rpartition(".")[0])]
        if len(rows) != 1:
            yield f"parameter {name!r} is matched by {len(rows)} rows: {rows}"


@pytest.mark.parametrize(("family", "flavor"), FLAVORS)
def test_every_parameter_has_one_tp_row_and_every_row_matches(family: Family, flavor: str) -> None:
    violations = list(tp_plan_violations(meta_model(family.name, flavor), family.tp_plan))
    assert not violations, "\n".join(violations)


def test_a_plan_with_a_hole_or_a_dead_row_is_reported_by_name() -> None:
    family = families()["llama"]
    plan = (
        *(row for row in family.tp_plan if row.role != "head"),
        PlanRow("layers.*.attention.wq", "colwise"),
        PlanRow("layers.*.typo", "rowwise"),
    )
    violations = list(tp_plan_violations(meta_model("llama", "debug"), plan))
    assert "row 'layers.*.typo' (rowwise) matches nothing" in violations
    assert "parameter 'output.weight' is matched by 0 rows: []" in violations
    assert any("'layers.0.attention.wq.weight' is matched by 2 rows" in v for v in violations)
    assert len(violations) == 2 + 4  # one second wq row in each of the 4 layers


@pytest.mark.parametrize(("family", "flavor"), FLAVORS)
def test_hf_key_map_covers_every_parameter_and_only_q_k_and_v_share(
    family: Family, flavor: str
) -> None:
    parts: dict[str, list[str]] = {}
    for name, _ in meta_model(family.name, flavor).named_parameters():
        assert sum(matches(row, name) for row in family.hf_key_map) == 1, name
        parts.setdefault(translate(name, family.hf_key_map), []).append(name)
    for reference, local in parts.items():
        kinds = [name.split(".")[-2] for name in local]
        assert len(local) == 1 or kinds == ["wq", "wk", "wv"], reference


@pytest.mark.parametrize("family", families().values(), ids=lambda family: family.name)
def test_every_row_of_the_hf_key_map_is_of_a_parameter_of_some_flavor(family: Family) -> None:
    names = {
        name for flavor in family.flavors for name in meta_model(family.name, flavor).state_dict()
    }
    dead = [row for row in family.hf_key_map if not any(matches(row, name) for name in names)]
    assert not dead


@pytest.mark.parametrize(("family", "flavor"), FLAVORS)
def test_every_parameter_has_exactly_one_init_rule(family: Family, flavor: str) -> None:
    model = meta_model(family.name, flavor)
    for name, parameter in model.named_parameters():
        # On meta, filling costs nothing and still finds the rule or raises.
        model.init_parameter(name, parameter.data, torch.Generator())
    with pytest.raises(ValueError, match="matched by 0 init rules, not one"):
        model.init_parameter("nothing.like.it", parameter.data, torch.Generator())
