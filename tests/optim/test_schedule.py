"""Laws of the learning-rate schedules."""

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from titan_lite.config.load import ConfigError
from titan_lite.config.schema import LRScheduler
from titan_lite.models.plan import make_plan
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


def factors(steps: tuple[int, ...], total: int = 100, **settings: Any) -> list[float]:
    section = LRScheduler(**{"warmup_steps": 10, "decay_type": "linear", **settings})
    return [round(lr_factor(step, section, total), 9) for step in steps]


def test_the_decay_starts_and_ends_where_the_keys_set_it() -> None:
    at = (10, 50, 55, 60, 80, 100)
    assert factors(at, decay_start=50, min_lr_factor=0) == [1, 1, 0.9, 0.8, 0.4, 0]
    assert factors(at, decay_steps=50, min_lr_factor=0) == [1, 1, 0.9, 0.8, 0.4, 0]
    # The decay of a continued run does not depend on training.steps.
    both = {"decay_start": 50, "decay_steps": 10, "min_lr_factor": 0.2}
    assert factors(at, **both) == factors(at, total=1000, **both) == [1, 1, 0.6, 0.2, 0.2, 0.2]


def test_inverse_sqrt_falls_from_its_start_to_the_floor() -> None:
    settings = {"decay_type": "inverse_sqrt", "warmup_steps": 4, "min_lr_factor": 0.25}
    assert factors((2, 4, 16, 36, 100), **settings) == [0.5, 1, 0.5, 0.333333333, 0.25]
    assert factors((16, 64), **settings, decay_start=16) == [1, 0.5]
    assert factors((1, 4), **{**settings, "warmup_steps": 0}) == [1, 0.5]


def test_a_second_warm_up_rises_from_0_to_the_schedule() -> None:
    settings = {"decay_type": "constant", "rewarmup_start": 50, "rewarmup_steps": 4}
    at = (49, 50, 51, 52, 53, 54, 55)
    assert factors(at, **settings) == [1, 1, 0.25, 0.5, 0.75, 1, 1]
    settings |= {"decay_type": "linear", "warmup_steps": 0, "min_lr_factor": 0}
    assert factors((50, 52, 54), **settings) == [0.5, 0.24, 0.46]


@pytest.mark.parametrize(
    ("settings", "key", "message"),
    [
        (["decay_start=5"], "decay_start", r"\(5\) must be at least .*warmup_steps \(10\) and"),
        (["decay_start=100"], "decay_start", r"below training.steps \(100\)"),
        (
            ["decay_steps=91"],
            "decay_steps",
            r"decay_steps \(91\) must be at most training.steps \(100\) - ",
        ),
        (
            ["decay_steps=9", "decay_ratio=0.5"],
            "decay_ratio",
            r"decay_ratio \(0.5\) cannot be combined with decay_start or decay_steps",
        ),
        (
            ["decay_type=inverse_sqrt", "decay_start=50", "decay_steps=9"],
            "decay_steps",
            'does not apply to decay_type = "inverse_sqrt" with decay_start: remove decay_steps',
        ),
    ],
)
def test_a_decay_that_cannot_be_is_refused(settings: list[str], key: str, message: str) -> None:
    overrides = [f"--lr_scheduler.{setting}" for setting in ("warmup_steps=10", *settings)]
    with pytest.raises(ConfigError, match=message) as error:
        make_plan(None, ["--training.steps=100", *overrides], world_size=1)
    assert [problem.key for problem in error.value.problems] == [f"lr_scheduler.{key}"]
