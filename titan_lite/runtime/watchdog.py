"""Reports each rank's step and phase when a collective hangs."""

import contextlib
import json
import logging
import math
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

import torch.distributed as dist

import titan_lite
from titan_lite.runtime.distributed import set_timeout
from titan_lite.runtime.progress import PHASES, Phase, Progress

logger = logging.getLogger(__name__)

# Share of the timeout after which a report is logged: before NCCL ends the process.
REPORT_AFTER = 0.8
MAX_SECONDS_BETWEEN_BEATS = 5.0
MAX_RANKS_REPORTED = 8
PACKAGE = Path(titan_lite.__file__).parent
# Files of torch whose functions are collectives.
COLLECTIVES = ("distributed_c10d.py", "_functional_collectives.py")


@dataclass(frozen=True)
class Beat:
    """A rank's last report. seconds: time in its phase. at: its clock at that time."""

    step: int
    phase: Phase
    seconds: float
    place: str
    at: float

    def describe(self, now: float, beat_seconds: float) -> str:
        """Returns the report in words, with the time since then if that is too long."""
        silence = now - self.at
        silent = f", silent for {silence:.0f} s" if silence > 3 * beat_seconds else ""
        seconds = self.seconds + max(silence, 0)
        return f"{self.phase} of step {self.step} for {seconds:.0f} s, {self.place}{silent}"


class Watchdog:
    """A thread that writes this rank's step to the store; logs those of all ranks in a hang."""

    def __init__(
        self,
        progress: Progress,
        store: dist.Store,
        *,
        rank: int,
        world_size: int,
        timeout: float,
        logs: bool,
        hint: str,
    ) -> None:
        """Starts the thread.

        store: a separate one, because waiting for a key blocks a store. timeout: seconds after
        which a collective fails. logs: True on the ranks that log the report. hint: the last line
        of a report.
        """
        self.logs = logs
        self._hint = hint
        self._timeout = timeout
        self._progress, self._store = progress, store
        self._rank, self._world_size = rank, world_size
        self._main_thread = threading.get_ident()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="titan_lite watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread."""
        self._stopped.set()
        self._thread.join(timeout=1)

    def set_timeout(self, seconds: int) -> None:
        """Sets the timeout of all process groups that training waits for; collective."""
        set_timeout(seconds)
        self._timeout = seconds

    def report(self) -> str:
        """The step and phase of every rank, those furthest behind first."""
        now = time.time()
        beats: dict[int, Beat] = {}
        for rank in range(self._world_size):
            with contextlib.suppress(RuntimeError):
                if self._store.check([_key(rank)]):
                    beats[rank] = Beat(**json.loads(self._store.get(_key(rank))))
        # Ranks outside of collectives first: the others wait for them.
        order = sorted(
            beats,
            key=lambda rank: (
                beats[rank].step,
                PHASES.index(beats[rank].phase),
                beats[rank].at > now - 3 * self._beat_seconds,
                beats[rank].place.startswith("in "),
            ),
        )
        lines = [
            f"  rank {rank}: {beats[rank].describe(now, self._beat_seconds)}"
            for rank in order[:MAX_RANKS_REPORTED]
        ]
        if len(order) > MAX_RANKS_REPORTED:
            lines.append(f"  and {len(order) - MAX_RANKS_REPORTED} more")
        if unknown := [rank for rank in range(self._world_size) if rank not in beats]:
            lines.append(f"  without any report: {unknown}")
        if self._hint:
            lines.append(self._hint)
        return "\n".join(["The ranks, those furthest behind first:", *lines])

    @property
    def _beat_seconds(self) -> float:
        return min(MAX_SECONDS_BETWEEN_BEATS, self._timeout / 10)

    def _run(self) -> None:
        reported, beaten = None, -math.inf
        while True:
            try:
                if time.monotonic() - beaten >= self._beat_seconds:
                    self._beat()
                    beaten = time.monotonic()
                since = self._progress.since
                is_stuck = self._progress.seconds() > REPORT_AFTER * self._timeout
                if self.logs and is_stuck and since != reported:
                    reported = since
                    seconds = self._progress.seconds()
                    logger.warning("No progress for %.0f s. %s", seconds, self.report())
            except RuntimeError:
                return  # The process with the store has ended.
            # Short waits, because the timeout, and so the time between beats, may become shorter.
            if self._stopped.wait(min(1, self._beat_seconds)):
                return

    def _beat(self) -> None:
        progress = self._progress
        place = code_position(sys._current_frames()[self._main_thread])
        beat = Beat(progress.step, progress.phase, progress.seconds(), place, time.time())
        self._store.set(_key(self._rank), json.dumps(asdict(beat)))


def code_position(frame: FrameType) -> str:
    """The collective that a thread is in, if any, and the line of this package that called it."""
    collective, line, innermost = "", "", ""
    for outer, number in traceback.walk_stack(frame):
        path = Path(outer.f_code.co_filename)
        innermost = innermost or f"{outer.f_code.co_name} ({path.name}:{number})"
        if path.name in COLLECTIVES:
            collective = outer.f_code.co_name
        if PACKAGE in path.parents:
            line = f"{path.relative_to(PACKAGE.parent)}:{number}"
            break
    what = f"in {collective}" if collective else f"at {innermost}"
    return f"{what}, from {line}" if line else what


def _key(rank: int) -> str:
    return f"titan_lite/progress/{rank}"
