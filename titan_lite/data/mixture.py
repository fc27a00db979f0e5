"""The source of each sample of a run, by index arithmetic without state.

Sample g is the point g * STEP on a circle of 2^64 points, and each source has an arc whose length
is its weight. A step of the golden ratio spreads any window of points, and every n-th of them, over
the circle as evenly as a fixed step can (Weyl's sequence; Sos's three-distance theorem). A source's
samples in a window differ from its share by a few samples, a number that grows with the logarithm
of the window's length.
"""

import bisect
import itertools
from collections.abc import Sequence
from fractions import Fraction

CIRCLE = 2**64
STEP = 0x9E3779B97F4A7C15  # 2^64 / the golden ratio, made odd: no point comes twice.


class Mixture:
    """A mixture of sources by weight; a source is its index."""

    def __init__(self, weights: Sequence[float]) -> None:
        # Exact fractions, so that the arcs are the same on every machine.
        ends = list(itertools.accumulate(map(Fraction, weights)))
        self._bounds = [0, *(round(end / ends[-1] * CIRCLE) for end in ends)]

    def source(self, sample: int) -> int:
        """Returns the source of global sample number `sample`."""
        return bisect.bisect_right(self._bounds, sample * STEP % CIRCLE) - 1

    def count(self, source: int, num_samples: int, *, start: int = 0, stride: int = 1) -> int:
        """Counts the samples of a source in the first num_samples of start, start + stride, ..."""
        low, high = self._bounds[source : source + 2]
        first = start * STEP % CIRCLE + CIRCLE
        step = stride * STEP % CIRCLE
        # A point lies in [low, high) when a whole turn ends between it less high and it less low.
        return _sum_of_quotients(num_samples, first - low, step) - _sum_of_quotients(
            num_samples, first - high, step
        )


def _sum_of_quotients(n: int, offset: int, slope: int) -> int:
    """Returns the sum of (offset + j * slope) // CIRCLE over j < n, by Euclid's algorithm."""
    total, sign, divisor = 0, 1, CIRCLE
    while n > 0:
        total += sign * (n * (n - 1) // 2 * (slope // divisor) + n * (offset // divisor))
        slope, offset = slope % divisor, offset % divisor
        top = slope * (n - 1) + offset
        if top < divisor:
            break
        # Counts the points under the line by rows instead of columns: the rectangle minus the
        # points above the line.
        rows = top // divisor
        total += sign * n * rows
        sign, n, offset = -sign, rows, divisor - offset + slope - 1
        slope, divisor = divisor, slope
    return total
