"""Compares two curves in one of three tiers, each with its largest allowed difference."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from titan_lite.config.units import format_table
from titan_lite.regression import noise
from titan_lite.regression.curves import (
    QUANTITIES,
    Array,
    Curve,
    CurveError,
    check_same_data,
    check_same_steps,
    differing_settings,
)

Tier = Literal["bitwise", "layout", "statistical"]
TIERS: tuple[Tier, ...] = get_args(Tier)

# Largest relative differences at every step in tier "layout"; docs/numerics.md has measurements.
LAYOUT_TOLERANCES: Mapping[str, Mapping[str, float]] = {
    "float32": {"loss": 1e-5, "grad_norm": 1e-4},
    # Steep gradients magnify rounding: to 15 % of the norm in some steps.
    "bfloat16": {"loss": 1e-2, "grad_norm": 0.25},
    "float16": {"loss": 1e-2, "grad_norm": 0.25},
    "float8": {"loss": 1e-2, "grad_norm": 0.25},
}
# The host computes the learning rate in float64 from the step alone, but the cosine may round
# differently on another machine.
LR_TOLERANCE = 1e-12


@dataclass(frozen=True)
class Track:
    """One quantity of two curves, at each step.

    a, b: the curves, smoothed in tier "statistical". difference: (b - a) / |a|; NaN where one is
    NaN or Inf. band: the largest allowed difference.
    """

    a: Array
    b: Array
    difference: Array
    band: Array

    @property
    def outside(self) -> list[int]:
        """The indices where the difference exceeds the band, or is NaN."""
        return np.flatnonzero(~(np.abs(self.difference) <= self.band)).tolist()

    @property
    def worst(self) -> int:
        """The index of the first NaN, else of the largest difference."""
        return int(np.argmax(np.abs(self.difference)))


@dataclass(frozen=True)
class Comparison:
    """Two curves and the deviation of each quantity."""

    a: Curve
    b: Curve
    tier: Tier
    tracks: Mapping[str, Track]
    tolerances: Mapping[str, float]

    @property
    def first_outside(self) -> tuple[str, int] | None:
        """The quantity that leaves its band first, and the index of the step."""
        first = [(t.outside[0], name) for name, t in self.tracks.items() if len(t.outside)]
        return min(first)[::-1] if first else None

    def verdict(self) -> str:
        """The result in one line."""
        count = f"{len(self.a.steps)} steps"
        outside = self.first_outside
        if outside is None:
            return f"within: {count} agree, tier {self.tier} ({self._allowed()})"
        name, index = outside
        track, a, b = self.tracks[name], self.a.values[name], self.b.values[name]
        return (
            f"OUTSIDE: {name} leaves the band of tier {self.tier} at step {self.a.steps[index]}: "
            f"{a[index]:.9g} and {b[index]:.9g}, {_relative(track.difference[index])} apart where "
            f"{_relative(track.band[index])} is allowed"
        )

    def _allowed(self) -> str:
        if self.tier == "bitwise":
            return "every digit"
        if self.tier == "layout":
            words = ", ".join(f"{name} {value:g}" for name, value in self.tolerances.items())
            return f"{self.a.dtype}: {words} relative"
        return f"false alarms: {noise.ALPHA:.0%}"

    def table(self) -> str:
        """A line for each quantity: its largest deviation, and where it is first outside."""
        rows = [("quantity", "largest deviation", "at step", "allowed there", "first outside")]
        for name, track in self.tracks.items():
            worst, outside = track.worst, track.outside
            rows.append(
                (
                    name,
                    _relative(track.difference[worst]),
                    str(self.a.steps[worst]),
                    _relative(track.band[worst]),
                    f"step {self.a.steps[outside[0]]}" if len(outside) else "-",
                )
            )
        return format_table(rows)

    def report(self) -> dict[str, Any]:
        """The result for JSON; NaN and Inf are text."""
        outside = self.first_outside
        return {
            "verdict": "within" if outside is None else "outside",
            "tier": self.tier,
            "a": self.a.name,
            "b": self.b.name,
            "dtypes": [self.a.dtype, self.b.dtype],
            "steps": len(self.a.steps),
            "first_step": int(self.a.steps[0]),
            "last_step": int(self.a.steps[-1]),
            "first_outside": outside
            and {"quantity": outside[0], "step": int(self.a.steps[outside[1]])},
            "quantities": {name: self._summary(track) for name, track in self.tracks.items()},
            "different_settings": {
                key: list(values) for key, values in differing_settings(self.a, self.b).items()
            },
        }

    def _summary(self, track: Track) -> dict[str, Any]:
        worst, outside = track.worst, track.outside
        return {
            "largest_deviation": _number(track.difference[worst]),
            "at_step": int(self.a.steps[worst]),
            "allowed_there": _number(track.band[worst]),
            "steps_outside": len(outside),
            "first_step_outside": int(self.a.steps[outside[0]]) if len(outside) else None,
        }


def compare(
    a: Curve, b: Curve, tier: Tier, tolerances: Mapping[str, float] | None = None
) -> Comparison:
    """Compares b with a; raises CurveError if these runs cannot be compared in the tier.

    tolerances: those of loss and grad_norm in tier "layout", instead of LAYOUT_TOLERANCES.
    """
    check_same_data(a.data, b.data, other_seeds=tier == "statistical")
    check_same_steps(a, b)
    if tier == "layout" and a.dtype != b.dtype:
        raise CurveError(
            f"the runs compute in {a.dtype} and {b.dtype}: --tier statistical compares precisions"
        )
    if tier == "statistical" and len(a.steps) < noise.MIN_STEPS:
        raise CurveError(
            f"--tier statistical estimates the noise from at least {noise.MIN_STEPS} logged steps, "
            f"and these are {len(a.steps)}"
        )
    tolerances = tolerances or LAYOUT_TOLERANCES[a.dtype]
    tracks = {}
    for name in QUANTITIES:
        pair = a.values[name], b.values[name]
        if tier != "bitwise" and name == "grad_norm":
            pair = _fill_skipped(*pair)
        if tier == "statistical" and name in ("loss", "grad_norm"):
            tracks[name] = _statistical(*pair)
        else:
            allowed = {"tokens": 0.0, "lr": LR_TOLERANCE, **tolerances}[name]
            tracks[name] = _stepwise(*pair, 0.0 if tier == "bitwise" else allowed)
    return Comparison(a, b, tier, tracks, tolerances)


def _stepwise(a: Array, b: Array, tolerance: float) -> Track:
    with np.errstate(invalid="ignore", divide="ignore"):
        difference = (b - a) / np.abs(a)
    same = a == b
    if tolerance == 0:
        same |= np.isnan(a) & np.isnan(b)
    difference[same] = 0.0
    return Track(a, b, difference, np.full(len(a), tolerance))


def _fill_skipped(a: Array, b: Array) -> tuple[Array, Array]:
    """Interpolates both norms from a's in steps where the gradients of both runs overflowed."""
    skipped, finite = ~np.isfinite(a) & ~np.isfinite(b), np.isfinite(a)
    if not finite.any():
        return a, b
    between = np.interp(np.arange(len(a)), np.flatnonzero(finite), a[finite])
    return np.where(skipped, between, a), np.where(skipped, between, b)


def _statistical(a: Array, b: Array) -> Track:
    usable = np.isfinite(a) & np.isfinite(b) & (a > 0) & (b > 0)
    end = len(a) if usable.all() else int(np.argmin(usable))
    smooth_a, smooth_b, difference, band = (np.full(len(a), np.nan) for _ in range(4))
    if end >= noise.MIN_STEPS:
        noisy = noise.distance(a[:end], b[:end])
        smooth_a[:end], smooth_b[:end] = noisy.smooth_a, noisy.smooth_b
        difference[:end], band[:end] = noisy.difference, noisy.band
    return Track(smooth_a, smooth_b, difference, band)


def _relative(value: float) -> str:
    return f"{value:.1e}" if value else "0"


def _number(value: float) -> float | str:
    return float(value) if np.isfinite(value) else str(value)
