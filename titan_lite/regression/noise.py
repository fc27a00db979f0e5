"""Distance between two smoothed curves, and the largest distance that their noise explains.

Both curves are taken as logarithms, so that distances are relative. With N steps, windows have
w = N / 10 steps:

    D(t)  = smooth(b)(t) - smooth(a)(t)        line fitted to the window around t
    SE(t) = sqrt(max(noise(a, 10) + noise(b, 10), noise(b - a, w)) * q(t) * r(t))

noise(x, m) is the long-run variance of a step of x, which includes autocorrelation up to m steps.
With x_m the mean of m steps, the second difference x_m(t) - 2 x_m(t + m) + x_m(t + 2m) does not
depend on a linear trend of x, and has 6 / m times that variance (as in metrology's Allan variance).
noise() takes the median of its square over t, which a steep start or a fault at the end does not
change.

noise(a, 10) and noise(b, 10) include noise that the runs have in common because they see the same
data; noise(b - a, w) misses it. noise(b - a, w) includes noise that is slow compared with 10 steps;
the common trend of the curves cancels in b - a. q(t) is the sum of the smoother's squared weights.
r(t) is the mean squared residual near t, divided by that of all steps, and at least 0.5.

The curves differ where |D(t)| exceeds SE(t) times Student's t at ALPHA / (2 x 2 x 10): two sides,
two quantities, ten independent windows. It has 10 - 2 degrees of freedom, the number of independent
second differences of windows of w steps.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from titan_lite.regression.curves import Array

ALPHA = 0.01
"""Probability that a comparison of two equal runs reports a difference."""
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
    separate = _noise(clipped_a, _SHORT) + _noise(clipped_b, _SHORT)
    of_difference = _noise(clipped_b - clipped_a, window)
    squares = (clipped_a - smooth_a) ** 2 + (clipped_b - smooth_b) ** 2
    near, _ = _local_lines(squares, 2 * window)
    # Without noise, as of a constant, the mean is 0.
    local = np.maximum(near / max(squares.mean(), np.finfo(float).tiny), 0.5)
    error = np.sqrt(max(separate, of_difference) * weights * local)
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
    """Fits a line to the window around each step, and returns its value at that step.

    The window is cut at the ends. The second result is the sum of the fit's squared weights.
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
    """Long-run variance of a step of y, with autocorrelation up to `steps` steps."""
    sums = np.concatenate([[0.0], np.cumsum(y)])
    means = (sums[steps:] - sums[:-steps]) / steps
    second = means[: -2 * steps] - 2 * means[steps:-steps] + means[2 * steps :]
    return float(np.median(second**2)) / _MEDIAN_OF_SQUARE * steps / 6


def _student_t(probability: float, freedom: int) -> float:
    """Quantile of Student's t, by its expansion around the normal quantile.

    The error is below 1 % for 8 or more degrees of freedom (Abramowitz and Stegun, 26.7.5).
    """
    z = NormalDist().inv_cdf(probability)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / math.pow(freedom, power) for power, term in enumerate(terms, start=1))
