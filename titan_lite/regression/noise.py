"""How far two curves are apart once smoothed, and how far their own noise would put them.

Both curves are taken as logarithms, so that distances are relative. N steps are seen through a
window of w = N / 10:

    D(t)  = smooth(b)(t) - smooth(a)(t)        local lines through windows of w steps
    SE(t) = sqrt(max(own, shared) * q(t) * r(t))
    own    = noise(a, 10) + noise(b, 10)
    shared = noise(b - a, w)

noise(x, m) is the long-run variance of a step of x, autocorrelation up to m steps included: with
x_m the mean of m steps, x_m(t) - 2 x_m(t + m) + x_m(t + 2m) is free of any line in x, and has 6 / m
times that variance (the second difference of metrology's Allan variance); its square is taken at
the median over t, which a fall at the beginning or a fault at the end does not move. `own` needs
one curve, so it holds for two runs over the same data, whose common noise `shared` cannot see;
`shared` holds for noise that is slow against 10 steps, since the shape common to both is gone.
q(t) is the sum of the smoother's squared weights; r(t), at least a half, how large the squared
residuals are near t against all of them.

The curves are apart where |D(t)| exceeds SE(t) times Student's t at ALPHA / (2 x 2 x 10): two
sides, two quantities, ten independent windows; with 10 - 2 degrees of freedom, as many as there are
independent second differences of windows of w.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from titan_lite.regression.curves import Array

ALPHA = 0.01
"""Probability that a comparison of two equal curves calls them apart."""
WINDOWS = 10
MIN_STEPS = 100
_SHORT = 10
_QUANTITIES = 2
# The median of a squared normal variable of variance 1, and a median's deviation over sigma.
_MEDIAN_OF_SQUARE = NormalDist().inv_cdf(0.75) ** 2
_SIGMA_OVER_MAD = 1 / NormalDist().inv_cdf(0.75)


@dataclass(frozen=True)
class Distance:
    """Two smoothed curves, their relative distance at each step, and its limit."""

    smooth_a: Array
    smooth_b: Array
    difference: Array
    band: Array


def distance(a: Array, b: Array) -> Distance:
    """Returns the distance of two positive finite curves of at least MIN_STEPS steps each."""
    assert len(a) == len(b) >= MIN_STEPS
    window = len(a) // WINDOWS
    smooth_a, clipped_a, weights = _smooth(np.log(a), window)
    smooth_b, clipped_b, _ = _smooth(np.log(b), window)
    own = _noise(clipped_a, _SHORT) + _noise(clipped_b, _SHORT)
    shared = _noise(clipped_b - clipped_a, window)
    squares = (clipped_a - smooth_a) ** 2 + (clipped_b - smooth_b) ** 2
    near, _ = _local_lines(squares, 2 * window)
    # A curve without noise, as a constant, has nothing to be relative to.
    local = np.maximum(near / max(squares.mean(), np.finfo(float).tiny), 0.5)
    error = np.sqrt(max(own, shared) * weights * local)
    limit = _student_t(1 - ALPHA / (2 * _QUANTITIES * WINDOWS), WINDOWS - 2)
    return Distance(np.exp(smooth_a), np.exp(smooth_b), smooth_b - smooth_a, error * limit)


def _smooth(y: Array, window: int) -> tuple[Array, Array, Array]:
    """The smoothed curve, the curve with spikes clipped to 3 sigma, and the sums of weights^2."""
    first, _ = _local_lines(y, window)
    residuals = y - first
    sigma = _SIGMA_OVER_MAD * np.median(np.abs(residuals))
    clipped = first + np.clip(residuals, -3 * sigma, 3 * sigma)
    smooth, weights = _local_lines(clipped, window)
    return smooth, clipped, weights


def _local_lines(y: Array, window: int) -> tuple[Array, Array]:
    """The line of least squares through the window around each step, at that step.

    The window is cut at the ends. Second, the sum of the squared weights that make it.
    """
    count, half = len(y), window // 2
    index = np.arange(count)
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, count)
    time = index - count / 2
    size = (high - low).astype(np.float64)

    def mean(values: NDArray[Any]) -> Array:
        sums = np.concatenate([[0.0], np.cumsum(values)])
        result: Array = (sums[high] - sums[low]) / size
        return result

    middle = mean(time)
    spread = mean(time * time) - middle**2
    slope = (mean(time * y) - middle * mean(y)) / spread
    offset = time - middle
    return mean(y) + slope * offset, 1 / size + offset**2 / (size * spread)


def _noise(y: Array, steps: int) -> float:
    """Variance of a step of y, with its correlation over `steps` steps."""
    sums = np.concatenate([[0.0], np.cumsum(y)])
    means = (sums[steps:] - sums[:-steps]) / steps
    second = means[: -2 * steps] - 2 * means[steps:-steps] + means[2 * steps :]
    return float(np.median(second**2)) / _MEDIAN_OF_SQUARE * steps / 6


def _student_t(probability: float, freedom: int) -> float:
    """Quantile of Student's t, by its expansion around the normal one.

    Within 1 % from 8 degrees of freedom on. Source: Abramowitz and Stegun, 26.7.5.
    """
    z = NormalDist().inv_cdf(probability)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / math.pow(freedom, power) for power, term in enumerate(terms, start=1))
