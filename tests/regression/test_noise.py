"""The statistical tier: how often it is wrong, on real curves, and what it finds."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from titan_lite.regression import noise

SEEDS = json.loads((Path(__file__).parent / "seeds.json").read_text())
QUANTITIES = ("loss", "grad_norm")


def apart(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns the steps where the curves are distinguished."""
    actual = noise.distance(a, b)
    return np.flatnonzero(np.abs(actual.difference) > actual.band)


@pytest.mark.parametrize("steps", [slice(0, 100), slice(0, 300), slice(100, 300)])
@pytest.mark.parametrize("quantity", QUANTITIES)
def test_false_alarms_on_real_pairs_of_seeds_are_rare(quantity: str, steps: slice) -> None:
    curves = [np.array(curve[steps]) for curve in SEEDS[quantity]]
    pairs = list(itertools.combinations(curves, 2))
    alarms = sum(bool(len(apart(a, b))) for a, b in pairs)
    assert len(pairs) == 45
    assert alarms <= 1  # of 45, at half of ALPHA = 1 % each


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_the_estimated_noise_is_that_between_seeds(quantity: str) -> None:
    """Distances are about one standard error: neither far less, which would hide faults."""
    curves = [np.array(curve) for curve in SEEDS[quantity]]
    limit = noise._student_t(1 - noise.ALPHA / 40, 8)
    squares = [
        np.mean((actual.difference / actual.band * limit) ** 2)
        for actual in itertools.starmap(noise.distance, itertools.combinations(curves, 2))
    ]
    assert 0.7 < np.sqrt(np.mean(squares)) < 1.4


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("steps", [300, 3000])
def test_false_alarms_are_rare_whatever_the_length_shape_and_correlation(
    steps: int, correlation: float
) -> None:
    generator = np.random.default_rng(0)
    shape = np.log(6 + 3 * np.exp(-np.arange(steps) / (steps / 8)))

    def curve() -> np.ndarray:
        values = generator.normal(0, 0.02, steps)
        for step in range(1, steps):
            values[step] += correlation * values[step - 1]
        return np.exp(shape + values)

    alarms = sum(bool(len(apart(curve(), curve()))) for _ in range(100))
    assert alarms <= 2


@pytest.mark.parametrize(
    ("loss", "grad_norm"),
    [
        (lambda y: y * 1.05, None),
        (lambda y: y + np.linspace(0, 1.0, 300), None),
        (lambda y: y + np.where(np.arange(300) < 200, 0, 0.5), None),
        (None, lambda y: y * 2),
    ],
    ids=["5 % higher", "drifts away", "jumps", "twice the norm"],
)
def test_what_is_more_than_noise_is_found_in_every_pair_of_seeds(loss, grad_norm) -> None:
    quantity, change = ("loss", loss) if loss else ("grad_norm", grad_norm)
    curves = [np.array(curve) for curve in SEEDS[quantity]]
    pairs = list(itertools.combinations(curves, 2))
    actual = [apart(a, change(b)) for a, b in pairs]
    assert np.mean([len(steps) > 0 for steps in actual]) > 0.8


def test_one_spike_is_no_difference_and_widens_no_band() -> None:
    a, b = (np.array(curve) for curve in SEEDS["grad_norm"][:2])
    spiked = b.copy()
    spiked[150] *= 50
    plain, actual = noise.distance(a, b), noise.distance(a, spiked)
    # Unclipped, log(50) over a window of 30 steps would be 0.13.
    assert np.abs(actual.difference - plain.difference).max() < 0.03
    assert (actual.band / plain.band).max() < 1.2


def test_curves_without_noise_are_apart_by_any_distance() -> None:
    flat = np.full(100, 2.0)
    assert len(apart(flat, flat)) == 0
    assert len(apart(flat, flat * 1.001)) == 100


def test_students_t_is_that_of_the_tables() -> None:
    # Tables give 5.041 for 8 degrees of freedom, two-sided 0.001.
    assert noise._student_t(0.9995, 8) == pytest.approx(5.041, rel=0.01)
    assert noise._student_t(0.975, 30) == pytest.approx(2.042, rel=0.001)
