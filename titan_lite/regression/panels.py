"""One panel of the report: a quantity of several runs over their steps, drawn by report.js."""

import html
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from titan_lite.regression.curves import Array

Scale = Literal["free", "from zero", "log"]
"""Range of the values' axis: around them, from zero, or logarithmic for values far apart."""
Style = Literal["line", "smoothed", "events"]
"""Drawing: a line, faint values below their running mean, or a bar for each value."""

# Columns of pixels that a curve is thinned to: about those of a panel on a laptop's screen.
COLUMNS = 520
# Largest over smallest value above which the axis is logarithmic.
LOG_RATIO = 20
# A running mean's window has 1 / _MEANS of the values.
_MEANS = 50


@dataclass(frozen=True)
class Line:
    """One run's values at some of its steps; NaN and Inf are reported, not drawn."""

    name: str
    steps: Array
    values: Array

    @property
    def finite(self) -> "Line":
        """The line without NaN and Inf."""
        kept = np.isfinite(self.values)
        return Line(self.name, self.steps[kept], self.values[kept])


def thin(steps: Array, values: Array, low: float, high: float) -> tuple[Array, Array]:
    """Keeps the smallest and the largest value of each column of pixels.

    low, high: the steps at the two ends of the drawing.
    """
    if len(steps) <= 2 * COLUMNS:
        return steps, values
    column = ((steps - low) / max(high - low, 1) * (COLUMNS - 1)).astype(int)
    kept = set()
    for part in np.split(np.arange(len(steps)), np.flatnonzero(np.diff(column)) + 1):
        kept |= {int(part[np.argmin(values[part])]), int(part[np.argmax(values[part])])}
    index = np.array(sorted(kept))
    return steps[index], values[index]


def running_mean(values: Array) -> Array:
    """The mean of a window around each value, applied twice so that a spike leaves no edges.

    The window narrows towards the start, where curves are steep, and is cut at the end.
    """
    index = np.arange(len(values))
    half = np.minimum(len(values) // (2 * _MEANS), index)
    start, end = index - half, np.minimum(index + half + 1, len(values))
    for _ in range(2):
        sums = np.concatenate([[0.0], np.cumsum(values)])
        values = (sums[end] - sums[start]) / (end - start)
    return values


def panel(
    title: str,
    unit: str,
    lines: Sequence[Line],
    scale: Scale,
    style: Style,
    first: float,
    last: float,
    resumes: Sequence[Sequence[int]],
) -> str:
    """Markup of a figure; its attributes hold the JSON that report.js draws.

    first, last: the steps at its ends. At least one line has a finite value. resumes: of each run,
    the steps after which it was resumed.
    """
    finite = [line.finite for line in lines]
    last = last if last > first else first + 1
    means = [
        Line(line.name, line.steps, running_mean(line.values))
        if style == "smoothed" and len(line.values) >= 2 * _MEANS
        else None
        for line in finite
    ]
    data = {
        "steps": [first, last],
        "scale": scale,
        "style": style,
        "lines": [_points(line, first, last) for line in finite],
        "means": [mean and _points(mean, first, last) for mean in means],
        "resumes": [[step for step in steps if first <= step <= last] for steps in resumes],
    }
    attributes = "".join(
        f' data-{name}="{html.escape(json.dumps(value))}"' for name, value in data.items()
    )
    log = str(scale == "log" and _is_wide(finite)).lower()
    return (
        f"<figure{attributes}><figcaption><span>{html.escape(title)} "
        f"<small>{html.escape(unit)}</small></span>"
        f'<button type="button" class="log" aria-pressed="{log}" '
        f'aria-label="{html.escape(title)}: logarithmic axis">log</button></figcaption>'
        f'<svg role="img" aria-label="{html.escape(title)}"></svg>'
        f"{''.join(_not_finite(lines))}</figure>"
    )


def _points(line: Line, first: float, last: float) -> list[Any]:
    """Steps and values of the points to draw."""
    steps, values = thin(line.steps, line.values, first, last)
    return [steps.tolist(), [float(f"{value:.6g}") for value in values]]


def _is_wide(lines: Sequence[Line]) -> bool:
    values = np.concatenate([line.values for line in lines])
    return bool(values.max() > LOG_RATIO * values.min() > 0)


def _not_finite(lines: Sequence[Line]) -> Iterator[str]:
    for number, line in enumerate(lines):
        steps = line.steps[~np.isfinite(line.values)]
        if len(steps):
            count = f"{len(steps):,} step{'s' if len(steps) > 1 else ''}"
            words = f"{line.name}: NaN or Inf at {count}, first at {steps[0]:,.0f}"
            yield f'<p class="warning" data-run="{number}">{html.escape(words)}</p>'
