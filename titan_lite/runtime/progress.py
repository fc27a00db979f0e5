"""The current step and phase of a rank, for reports about a hang."""

import time
from typing import Literal, get_args

Phase = Literal["start", "data", "forward", "backward", "optimizer", "validation", "log", "save"]
# In order of execution.
PHASES: tuple[Phase, ...] = get_args(Phase)


class Progress:
    """The current step and phase of this process; the main thread writes it, others read it."""

    def __init__(self) -> None:
        self.step = 0
        self.phase: Phase = "start"
        self.since = time.monotonic()

    def seconds(self) -> float:
        """Seconds since the phase started."""
        return time.monotonic() - self.since

    def enter(self, phase: Phase, *, step: int | None = None) -> None:
        """Starts a phase of `step`, or of the current step."""
        if step is not None:
            self.step = step
        self.phase = phase
        self.since = time.monotonic()
