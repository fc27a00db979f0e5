"""Fits constants to published rows, with a prior around each literature value."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from titan_lite.planner.constants import LITERATURE, SPREADS, base_name
from titan_lite.tools.published import PublishedRow, predict_row

Vector = NDArray[np.float64]
# Standard deviation of log(measured / predicted) that a correct model would have.
NOISE = 0.05
ROUNDS = 4


@dataclass(frozen=True)
class Fit:
    """Fitted constants. spreads: posterior log deviations. freedom: effective parameters."""

    values: dict[str, float]
    spreads: dict[str, float]
    freedom: float


def fit(rows: Sequence[PublishedRow], spreads: Mapping[str, float] = SPREADS) -> Fit:
    """Fits the constants in `spreads` to the rows that can be predicted, by Gauss-Newton steps."""
    distinct = {str(sorted(r.items() - {("note", r.get("note"))}, key=str)): r for r in rows}
    used = [r for r in distinct.values() if predict_row(r, LITERATURE).value is not None]
    names = list(spreads)
    prior = np.array([1 / spreads[name] ** 2 for name in names])
    theta = np.zeros(len(names))

    def values(theta: Vector) -> dict[str, float]:
        return LITERATURE | {
            n: LITERATURE[base_name(n)] * math.exp(x) for n, x in zip(names, theta, strict=True)
        }

    def logs(theta: Vector) -> Vector:
        known = values(theta)
        return np.array([math.log1p(predict_row(row, known).error) for row in used])

    for _ in range(ROUNDS):
        now, slopes = logs(theta), []
        for number in range(len(names)):
            moved = theta.copy()
            moved[number] += 0.01
            slopes.append((logs(moved) - now) / 0.01)
        J = np.array(slopes).T / NOISE
        precision = J.T @ J + np.diag(prior)
        theta = theta - np.linalg.solve(precision, J.T @ (now / NOISE) + prior * theta)
    covariance = np.linalg.inv(precision)
    return Fit(
        values={name: round(v, 4) for name, v in values(theta).items() if name in names},
        spreads={n: float(s) for n, s in zip(names, np.sqrt(np.diag(covariance)), strict=True)},
        freedom=float(np.trace(J @ covariance @ J.T)),
    )
