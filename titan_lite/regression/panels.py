"""One panel of the report: a quantity of several runs over their steps, as inline SVG."""

import html
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Scale = Literal["free", "from zero", "log"]
"""Of the values: from the smallest, from zero, or logarithmic where they span a wide range."""

# Of the drawing, in its own units, which are pixels on a laptop's screen.
WIDTH, HEIGHT = 600, 230
LEFT, RIGHT, TOP, BOTTOM = 62, 18, 10, 24
# The largest value over the smallest, beyond which a logarithmic scale is taken.
_LOG_RATIO = 20


@dataclass(frozen=True)
class Line:
    """One run's values at some of its steps; NaN and infinities are left out and told."""

    name: str
    steps: Array
    values: Array


@dataclass(frozen=True)
class Axis:
    """Maps values to places between two ends of the drawing."""

    low: float
    high: float
    begin: float
    end: float
    log: bool = False

    def __call__(self, values: Array) -> Array:
        """Places of values, in the drawing's units."""
        low, high = self.low, self.high
        if self.log:
            low, high, values = math.log(low), math.log(high), np.log(values)
        return self.begin + (values - low) / (high - low) * (self.end - self.begin)

    def ticks(self, count: int) -> list[float]:
        """About `count` round values on the axis."""
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            decades = [10.0**power for power in range(first, last + 1)]
            few = self.high / self.low < 1e3
            marks = [d * f for d in decades for f in (1, 2, 5)] if few else decades
            return [mark for mark in marks if self.low <= mark <= self.high]
        rough = (self.high - self.low) / count
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(f * unit for f in (1, 2, 5, 10) if f * unit >= rough)
        first = math.ceil(self.low / step)
        return [n * step for n in range(first, math.floor(self.high / step + 1e-9) + 1)]


def thin(steps: Array, values: Array, low: float, high: float) -> tuple[Array, Array]:
    """The smallest and the largest value of each column of pixels, in their order.

    low, high: the steps at the two ends of the drawing.
    """
    columns = WIDTH - LEFT - RIGHT
    if len(steps) <= 2 * columns:
        return steps, values
    column = ((steps - low) / max(high - low, 1) * (columns - 1)).astype(int)
    kept = set()
    for part in np.split(np.arange(len(steps)), np.flatnonzero(np.diff(column)) + 1):
        kept |= {int(part[np.argmin(values[part])]), int(part[np.argmax(values[part])])}
    index = np.array(sorted(kept))
    return steps[index], values[index]


def panel(title: str, unit: str, lines: Sequence[Line], scale: Scale) -> str:
    """A figure; what it shows when pointed at is in its data-lines, as JSON."""
    finite = [
        Line(x.name, x.steps[np.isfinite(x.values)], x.values[np.isfinite(x.values)]) for x in lines
    ]
    caption = f"<figcaption>{html.escape(title)} <small>{html.escape(unit)}</small></figcaption>"
    if not any(len(line.steps) for line in finite):
        return f'<figure class="empty">{caption}<p>nothing was logged</p></figure>'
    all_values = np.concatenate([line.values for line in finite])
    all_steps = np.concatenate([line.steps for line in finite])
    low, high = float(all_values.min()), float(all_values.max())
    log = scale == "log" and low > 0 and high / low > _LOG_RATIO
    if not log:
        if scale == "from zero":
            low = min(low, 0.0)
        margin = 0.05 * (high - low) or abs(high) * 0.05 or 1.0
        low, high = (low if scale == "from zero" else low - margin), high + margin
    across = Axis(float(all_steps.min()), _beyond(all_steps), LEFT, WIDTH - RIGHT)
    up = Axis(low, high, HEIGHT - BOTTOM, TOP, log)
    drawn = [thin(line.steps, line.values, across.low, across.high) for line in finite]
    data = [[x.tolist(), [float(f"{v:.6g}") for v in y]] for x, y in drawn]
    curves = "".join(
        f'<polyline class="run{number}" points="{_points(across(x), up(y))}"/>'
        for number, (x, y) in enumerate(drawn)
    )
    axes = [LEFT, WIDTH - RIGHT, across.low, across.high]
    cursor = f'<line class="cursor" visibility="hidden" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
    return (
        f'<figure data-axes="{axes}" data-lines="{json.dumps(data)}">{caption}'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">'
        f"{''.join(_grid(across, up))}{curves}{cursor}</svg>{_not_finite(lines)}</figure>"
    )


def _beyond(steps: Array) -> float:
    """The last step, or one more where it is the only one."""
    return float(steps.max() if steps.max() > steps.min() else steps.max() + 1)


def _points(x: Array, y: Array) -> str:
    # A single point would be no line.
    if len(x) == 1:
        x, y = np.array([x[0], x[0] + 2]), np.array([y[0], y[0]])
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))


def _grid(across: Axis, up: Axis) -> Iterator[str]:
    for value in up.ticks(5):
        y = up(np.array(value))
        yield f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:,.5g}</text>'
    for value in across.ticks(6):
        x = across(np.array(value))
        yield f'<text x="{x:.1f}" y="{HEIGHT - 7}" text-anchor="middle">{value:,.6g}</text>'


def _not_finite(lines: Sequence[Line]) -> str:
    words = []
    for line in lines:
        steps = line.steps[~np.isfinite(line.values)]
        if len(steps):
            words.append(f"{line.name}: not finite at {len(steps)} steps, first at {steps[0]:.0f}")
    return f'<p class="warning">{html.escape("; ".join(words))}</p>' if words else ""
