"""Splits blocks into pipeline stages by their costs."""

import functools
import itertools
import math
from collections.abc import Sequence


def balanced(costs: Sequence[int], num_parts: int) -> list[tuple[int, int]]:
    """Returns the bounds of consecutive, non-empty parts whose largest cost is minimal.

    Of several such splits it returns the most even one, with larger parts first, because the last
    stage of a pipeline also computes the loss.
    """
    n, total = len(costs), list(itertools.accumulate(costs, initial=0))

    @functools.cache
    def largest(start: int, parts: int) -> int:
        if parts == 1:
            return total[n] - total[start]
        return min(
            max(total[end] - total[start], largest(end, parts - 1))
            for end in range(start + 1, n - parts + 2)
        )

    limit = largest(0, num_parts)

    @functools.cache
    def most_even(start: int, parts: int) -> tuple[float, tuple[int, ...]]:
        """(sum of squares, negated ends of the parts)."""
        ends = [n] if parts == 1 else range(start + 1, n - parts + 2)
        cuts: list[tuple[float, tuple[int, ...]]] = [(math.inf, ())]
        for end in ends:
            if (cost := total[end] - total[start]) <= limit:
                squares, rest = most_even(end, parts - 1) if parts > 1 else (0, ())
                cuts.append((cost**2 + squares, (-end, *rest)))
        return min(cuts)

    ends = [-end for end in most_even(0, num_parts)[1]]
    return list(itertools.pairwise([0, *ends]))
