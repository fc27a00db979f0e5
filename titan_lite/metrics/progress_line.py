"""The last line of a terminal: how far the run is, and how long it still takes."""

import contextlib
import logging
import math
import shutil
from typing import TextIO

from titan_lite.config.units import format_duration
from titan_lite.metrics.record import Record

_LONGEST_BAR, _SHORTEST_BAR = 20, 5
# Weight of the last record in what is smoothed.
_NEWEST = 0.1


class _Smoothed:
    """An exponential mean, its first values weighing no more than the others."""

    def __init__(self) -> None:
        self._sum = self._weight = 0.0

    def add(self, value: float) -> None:
        if math.isfinite(value):
            self._sum += _NEWEST * (value - self._sum)
            self._weight += _NEWEST * (1 - self._weight)

    def __str__(self) -> str:
        return f"{self.value:.4f}" if self._weight else "-"

    @property
    def value(self) -> float:
        """NaN before the first one."""
        return self._sum / self._weight if self._weight else math.nan


class ProgressLine:
    """Drawn below the last record and erased, by blanks, before the next one or a log message."""

    def __init__(self, num_steps: int, stream: TextIO) -> None:
        self._num_steps = num_steps
        self._stream = stream
        self._loss, self._seconds = _Smoothed(), _Smoothed()
        self._drawn = 0
        self._handlers = list(logging.getLogger("titan_lite").handlers)
        for handler in self._handlers:
            handler.addFilter(self._make_room)

    def draw(self, record: Record) -> None:
        """Steps done, tokens, smoothed loss and what is left of the time."""
        step = int(record["step"])
        if step >= self._num_steps:
            return
        self._loss.add(record["loss"])
        fields = {
            "steps": f"{step}/{self._num_steps} steps",
            "tokens": f"{_short(record['tokens'])} tokens",
            "loss": f"smoothed loss {self._loss}",
        }
        if not record.get("warmup"):
            self._seconds.add(record["seconds_per_step"])
            left = (self._num_steps - step) * self._seconds.value
            fields["left"] = f"{format_duration(left)} left"
        text = self._fit(fields, step, shutil.get_terminal_size().columns - 1)
        self._write(text)
        self._drawn = len(text)

    def _fit(self, fields: dict[str, str], step: int, room: int) -> str:
        """Drops the least important parts first; the bar takes the width that is left."""
        for name in ("tokens", "loss"):
            if len("  ".join(fields.values())) > room:
                del fields[name]
        text = "  ".join(fields.values())[:room]
        length = min(_LONGEST_BAR, room - len(text) - len("[] "))
        if length < _SHORTEST_BAR:
            return text
        return f"[{'=' * (length * step // self._num_steps):<{length}}] {text}"

    def erase(self) -> None:
        """Leaves the cursor at the start of an empty line."""
        if self._drawn:
            self._write(f"\r{' ' * self._drawn}\r")
            self._drawn = 0

    def close(self) -> None:
        """Erases the line for good."""
        self.erase()
        for handler in self._handlers:
            handler.removeFilter(self._make_room)

    def _write(self, text: str) -> None:
        # A terminal that was closed must not keep the run from its checkpoint.
        with contextlib.suppress(OSError):
            self._stream.write(text)
            self._stream.flush()

    def _make_room(self, _message: logging.LogRecord) -> bool:
        self.erase()
        return True


def _short(count: float) -> str:
    """12345678 as 12.3M."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        # As rounded: 999,999 is 1M.
        if (rounded := float(f"{count:.3g}")) >= size:
            return f"{rounded / size:.3g}{unit}"
    return f"{count:.0f}"
