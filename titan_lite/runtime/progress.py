"""Where a rank is in its work, for whoever wants to know why it does not go on."""

import time
from typing import Literal

Phase = Literal["start", "data", "forward", "backward", "optimizer", "validation", "log", "save"]
# In the order of a step.
PHASES: tuple[Phase, ...] = (
    "start",
    "data",
    "forward",
    "backward",
    "optimizer",
    "validation",
    "log",
    "save",
)


class Progress:
    """The step and phase this process is in, written by its main thread, read by others."""

    def __init__(self) -> None:
        self.step = 0
        self.phase: Phase = "start"
        self.since = time.monotonic()

    def seconds(self) -> float:
        """Since the phase began."""
        return time.monotonic() - self.since

    def enter(self, phase: Phase, *, step: int | None = None) -> None:
        """Begins a phase, of the step in hand unless one is given."""
        if step is not None:
            self.step = step
        self.phase = phase
        self.since = time.monotonic()
