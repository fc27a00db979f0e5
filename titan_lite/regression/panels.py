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
Style = Literal["line", "smoothed", "events"]
"""Of the drawing: each value, those faint below a running mean, or a bar where something was."""

# Of the drawing, in its own units, which are pixels on a laptop's screen.
WIDTH, HEIGHT = 600, 230
LEFT, RIGHT, TOP, BOTTOM = 62, 18, 10, 24
# The widest of the usual fonts at the size of report.css.
_CHARACTER = 7.5
# The largest value over the smallest, beyond which a logarithmic scale is taken.
LOG_RATIO = 20
# Of values: with fewer, each is a dot; a running mean covers one part of them in so many.
_FEW, _MEANS = 40, 50


@dataclass(frozen=True)
class Line:
    """One run's values at some of its steps; NaN and infinities are left out and told."""

    name: str
    steps: Array
    values: Array

    @property
    def finite(self) -> "Line":
        """Without what cannot be drawn."""
        kept = np.isfinite(self.values)
        return Line(self.name, self.steps[kept], self.values[kept])


@dataclass(frozen=True)
class Axis:
    """Maps values to places between two ends of the drawing; its ticks may be whole numbers."""

    low: float
    high: float
    begin: float
    end: float
    log: bool = False
    whole: bool = False

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
            every = 1 + (last - first) // (2 * count)
            decades = [10.0**power for power in range(first, last + 1, every)]
            few = self.high / self.low < 1e3
            marks = [d * f for d in decades for f in (1, 2, 5)] if few else decades
            return [mark for mark in marks if self.low <= mark <= self.high]
        rough = (self.high - self.low) / count
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(f * unit for f in (1, 2, 5, 10) if f * unit >= rough)
        if self.whole:
            step = max(step, 1.0)
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


def running_mean(values: Array) -> Array:
    """The mean of a window around each value, taken twice for spikes to leave no steps.

    The window narrows towards the begin, where curves are steep, and is cut at the end.
    """
    index = np.arange(len(values))
    half = np.minimum(len(values) // (2 * _MEANS), index)
    begin, end = index - half, np.minimum(index + half + 1, len(values))
    for _ in range(2):
        sums = np.concatenate([[0.0], np.cumsum(values)])
        values = (sums[end] - sums[begin]) / (end - begin)
    return values


def panel(
    title: str,
    unit: str,
    lines: Sequence[Line],
    scale: Scale,
    style: Style,
    first: float,
    last: float,
) -> str:
    """A figure; what it shows when pointed at is in its data-lines, as JSON.

    first, last: the steps at its ends. Some line has a finite value.
    """
    finite = [line.finite for line in lines]
    across = Axis(first, last if last > first else first + 1, LEFT, WIDTH - RIGHT, whole=True)
    up = _up(np.concatenate([line.values for line in finite]), scale)
    drawn = [thin(line.steps, line.values, across.low, across.high) for line in finite]
    data = [[x.tolist(), [float(f"{v:.6g}") for v in y]] for x, y in drawn]
    curves = "".join(_curve(number, line, across, up, style) for number, line in enumerate(finite))
    axes = [LEFT, WIDTH - RIGHT, across.low, across.high]
    cursor = f'<line class="cursor" visibility="hidden" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
    return (
        f'<figure data-axes="{axes}" data-lines="{json.dumps(data)}">'
        f"<figcaption>{html.escape(title)} <small>{html.escape(unit)}</small></figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">'
        f"{''.join(_grid(across, up))}{curves}{cursor}</svg>{_not_finite(lines)}</figure>"
    )


def _up(values: Array, scale: Scale) -> Axis:
    """The axis of values, with a margin around them."""
    low, high = float(values.min()), float(values.max())
    log = scale == "log" and low > 0 and high / low > LOG_RATIO
    if not log:
        if scale == "from zero":
            low = min(low, 0.0)
        margin = 0.05 * (high - low) or abs(high) * 0.05 or 1.0
        low, high = (low if scale == "from zero" else low - margin), high + margin
    return Axis(low, high, HEIGHT - BOTTOM, TOP, log)


def _curve(number: int, line: Line, across: Axis, up: Axis, style: Style) -> str:
    """What is drawn of one run."""
    if not len(line.steps):
        return ""
    place = f'class="run{number}'
    x, y = across(line.steps), up(line.values)
    if style == "events":
        beside = x + 3 * number
        bars = "".join(f"M{a:.1f},{up.begin:.1f}V{b:.1f}" for a, b in zip(beside, y, strict=True))
        return f'<path {place} event" d="{bars}"/>'
    drawn = ""
    values = line.values
    if style == "smoothed" and len(values) >= 2 * _MEANS:
        drawn = f'<polyline {place} each" points="{_points(line.steps, values, across, up)}"/>'
        values = running_mean(values)
    drawn += f'<polyline {place}" points="{_points(line.steps, values, across, up)}"/>'
    # Where a run ended is not to be guessed behind the others; a single value is no line.
    dots = zip(x, y, strict=True) if len(x) < _FEW else ((x[-1], up(values[-1:])[0]),)
    marks = "".join(f"M{a:.1f},{b:.1f}h0" for a, b in dots)
    return f'{drawn}<path {place} dots" d="{marks}"/>'


def _points(steps: Array, values: Array, across: Axis, up: Axis) -> str:
    x, y = thin(steps, values, across.low, across.high)
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(across(x), up(y), strict=True))


def _grid(across: Axis, up: Axis) -> Iterator[str]:
    for value in up.ticks(5):
        y = up(np.array(value))
        yield f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:,.5g}</text>'
    base = HEIGHT - 7
    yield f'<text x="{LEFT - 26}" y="{base}" text-anchor="end">step</text>'
    for value in across.ticks(6):
        label = f"{value:,.0f}"
        # A long one at the right end moves inwards.
        x = min(float(across(np.array(value))), WIDTH - len(label) * _CHARACTER / 2)
        yield f'<text x="{x:.1f}" y="{base}" text-anchor="middle">{label}</text>'


def _not_finite(lines: Sequence[Line]) -> str:
    words = []
    for line in lines:
        steps = line.steps[~np.isfinite(line.values)]
        if len(steps):
            words.append(f"{line.name}: not finite at {len(steps)} steps, first at {steps[0]:.0f}")
    return f'<p class="warning">{html.escape("; ".join(words))}</p>' if words else ""
