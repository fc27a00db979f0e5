"""Laws of the learning-rate schedules."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from titan_lite.config.schema import LRScheduler
from titan_lite.optim.schedule import lr_factor

sections = st.builds(
    LRScheduler,
    warmup_steps=st.integers(0, 50),
    decay_type=st.sampled_from(["linear", "cosine", "sqrt", "constant"]),
    decay_ratio=st.floats(0, 1),
    min_lr_factor=st.floats(0, 1),
)


@given(sections, st.integers(51, 300))
def test_factor_rises_to_one_then_never_rises_and_ends_at_the_floor(
    section: LRScheduler, steps: int
) -> None:
    factors = [lr_factor(step, section, steps) for step in range(1, steps + 1)]
    warmup = section.warmup_steps
    assert all(0 < factor <= 1 for factor in factors[:warmup])
    if warmup:
        assert factors[warmup - 1] == 1
    after = factors[warmup:]
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(after))
    assert all(section.min_lr_factor - 1e-12 <= factor <= 1 for factor in after)
    decays = section.decay_type != "constant" and round(steps * section.decay_ratio) > 0
    assert after[-1] == pytest.approx(section.min_lr_factor if decays else 1.0)


@pytest.mark.parametrize(
    ("decay_type", "halfway"), [("linear", 0.55), ("cosine", 0.55), ("constant", 1.0)]
)
def test_halfway_between_peak_and_floor(decay_type: str, halfway: float) -> None:
    section = LRScheduler(warmup_steps=10, decay_type=decay_type, min_lr_factor=0.1)
    assert lr_factor(60, section, 110) == pytest.approx(halfway)


def test_wsd_stays_at_the_peak_until_the_decay_begins() -> None:
    section = LRScheduler(warmup_steps=10, decay_type="linear", decay_ratio=0.2, min_lr_factor=0.0)
    assert [lr_factor(step, section, 100) for step in (5, 10, 50, 80, 90, 100)] == pytest.approx(
        [0.5, 1, 1, 1, 0.5, 0]
    )
