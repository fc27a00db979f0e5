"""Laws of every registered family, and the published sizes of Llama."""

from collections.abc import Iterator
from functools import lru_cache

import pytest
import torch
from torch import nn

from titan_lite.models.family import Family
from titan_lite.models.patterns import matches, translate
from titan_lite.models.registry import families
from titan_lite.models.roles import PlanRow
from titan_lite.nn.build import build

FLAVORS = [
    pytest.param(family, flavor, id=f"{family.name}-{flavor}")
    for family in families().values()
    for flavor in family.flavors
]
LLAMA_PARAMETERS = {
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama2_70b": 68_976_648_192,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama3.1_8b": 8_030_261_248,
    "llama3.1_70b": 70_553_706_496,
    "llama3.1_405b": 405_853_388_800,
}


@lru_cache
def meta_model(family: str, flavor: str) -> nn.Module:
    found = families()[family]
    with torch.device("meta"):
        return build(found, found.flavors[flavor])


@pytest.mark.parametrize("flavor", LLAMA_PARAMETERS)
def test_llama_has_exactly_the_published_number_of_parameters(flavor: str) -> None:
    model = meta_model("llama", flavor)
    assert sum(p.numel() for p in model.parameters()) == LLAMA_PARAMETERS[flavor]


def test_every_llama_flavor_but_debug_has_a_published_size_to_be_tested_against() -> None:
    assert families()["llama"].flavors.keys() - LLAMA_PARAMETERS == {"debug"}


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
    assert (args.num_heads, args.num_kv_heads, args.head_dim) == (heads, kv_heads, 128)
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
def test_hf_key_map_covers_every_parameter_and_is_bijective(family: Family, flavor: str) -> None:
    names = [name for name, _ in meta_model(family.name, flavor).named_parameters()]
    translated = [translate(name, family.hf_key_map) for name in names]
    assert len(set(translated)) == len(names)
    inverse = {theirs: ours for ours, theirs in family.hf_key_map.items()}
    assert len(inverse) == len(family.hf_key_map)
    assert [translate(name, inverse) for name in translated] == names
    dead = [row for row in family.hf_key_map if not any(matches(row, name) for name in names)]
    assert not dead


@pytest.mark.parametrize(("family", "flavor"), FLAVORS)
def test_every_parameter_has_exactly_one_init_rule(family: Family, flavor: str) -> None:
    model = meta_model(family.name, flavor)
    for name, parameter in model.named_parameters():
        # On meta, filling costs nothing and still finds the rule or raises.
        model.init_parameter(name, parameter.data, torch.Generator())
