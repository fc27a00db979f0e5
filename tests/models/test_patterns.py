"""The pattern language of the model tables."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from titan_lite.models.patterns import matches, translate

PART = st.text("abcxyz_0123456789", min_size=1, max_size=4)


@given(st.lists(PART, min_size=1, max_size=5))
def test_a_name_matches_itself_and_stars_for_its_parts(parts: list[str]) -> None:
    name = ".".join(parts)
    assert matches(name, name)
    assert matches(".".join("*" * len(parts)), name)
    assert not matches("*." + ".".join("*" * len(parts)), name)


def test_a_star_never_spans_a_dot() -> None:
    assert matches("layers.*.attention.w[qkv]", "layers.12.attention.wq")
    assert not matches("layers.*.wq", "layers.12.attention.wq")
    assert not matches("layers.*", "layers")
    assert not matches("layers.*.attention.w[qkv]", "layers.12.attention.wo")


@given(st.lists(st.integers(0, 999), min_size=2, max_size=2))
def test_translation_carries_numbers_over_and_back(numbers: list[int]) -> None:
    table = {"layers.*.experts.*.w1": "model.layers.*.mlp.*.gate", "norm": "model.norm"}
    inverse = {reference: local for local, reference in table.items()}
    name = f"layers.{numbers[0]}.experts.{numbers[1]}.w1"
    translated = translate(name, table)
    assert translated == f"model.layers.{numbers[0]}.mlp.{numbers[1]}.gate"
    assert translate(translated, inverse) == name


def test_an_unknown_name_is_named() -> None:
    with pytest.raises(KeyError, match=r"layers\.0\.bias is matched by no row"):
        translate("layers.0.bias", {"norm.weight": "model.norm.weight"})
