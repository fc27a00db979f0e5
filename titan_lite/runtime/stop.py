"""Signals that request a stop: noted when they arrive, handled between steps. No torch."""

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Collection, Iterator
from pathlib import Path

from titan_lite.runtime.log import MESSAGES
from titan_lite.runtime.progress import Progress

logger = logging.getLogger(__name__)

EXIT_FAILED = 1
# A usage or configuration error, or a folder that is in use.
EXIT_USAGE = 2
# EX_TEMPFAIL in sysexits.h: stopped with a checkpoint; the run resumes when it is started again.
EXIT_STOPPED = 75
# The same as of a process that SIGTERM ended: stopped without a checkpoint.
EXIT_STOPPED_UNSAVED = 128 + signal.SIGTERM
# Exit codes of a process that did not fail.
ORDERLY = (0, EXIT_STOPPED, EXIT_STOPPED_UNSAVED)
# File in the folder of MESSAGES with the name of the signal that the launcher received.
SENT = "signal"
STOPPING_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
# Seconds without progress after which SIGTERM ends a process at once. When a process has died, the
# launcher sends SIGTERM to the others, which may wait for it, and kills them after 30 s.
TERM_GRACE = 25.0


def handled_signals() -> list[signal.Signals]:
    """Signals that request a stop, without those that the parent set to be ignored (nohup)."""
    return [number for number in STOPPING_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]


def worst_code(codes: Collection[int]) -> int:
    """The exit code of several processes: usage errors first, then failures, then stops."""
    order = [EXIT_USAGE, EXIT_FAILED, EXIT_STOPPED_UNSAVED, EXIT_STOPPED, 0]
    known = [code if code in order else EXIT_FAILED for code in codes]
    return min(known, key=order.index)


def _sent(number: signal.Signals) -> str:
    """The name of the original signal: the launcher forwards each one as SIGUSR1."""
    if number == signal.SIGUSR1 and MESSAGES in os.environ:
        with contextlib.suppress(OSError):
            return (Path(os.environ[MESSAGES]) / SENT).read_text()
    return number.name


class StopRequest:
    """A request to stop this process. `signal`: name of the signal; None until there is one.

    After SIGTERM, the process ends as soon as its progress shows TERM_GRACE seconds in one phase.
    """

    def __init__(self, progress: Progress) -> None:
        self.signal: str | None = None
        self._progress = progress

    def launcher_has_gone(self) -> None:
        """Requests a stop because the process that started this one has ended."""
        self.signal = "its launcher has ended"
        self._end_if_stuck()

    def comes_within(self, seconds: float) -> bool:
        """Waits up to `seconds`; returns True if a stop was requested."""
        deadline = time.monotonic() + seconds
        while self.signal is None and time.monotonic() < deadline:
            time.sleep(0.02)
        return self.signal is not None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Notes signals inside the context, instead of ending the process. For the main thread.

        A thread reads them, because Python's handlers only run when the main thread returns from
        library code.
        """
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        former_fd = signal.set_wakeup_fd(write_end)
        former = {number: signal.signal(number, lambda *_: None) for number in handled_signals()}
        thread = threading.Thread(
            target=self._listen, args=(read_end,), name="titan_lite signals", daemon=True
        )
        thread.start()
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(former_fd)
            os.close(write_end)
            thread.join()
            os.close(read_end)

    def _listen(self, read_end: int) -> None:
        while number := os.read(read_end, 1):
            self._note(signal.Signals(number[0]))

    def _note(self, number: signal.Signals) -> None:
        if number not in STOPPING_SIGNALS:
            return
        if number == signal.SIGINT:
            if self.signal == number.name:
                os._exit(128 + number)
            logger.info("Stopping within three steps; Ctrl-C again ends at once")
        if number == signal.SIGTERM:
            threading.Thread(target=self._end_if_stuck, daemon=True).start()
        self.signal = _sent(number)

    def _end_if_stuck(self) -> None:
        while self._progress.phase == "save" or self._progress.seconds() < TERM_GRACE:
            time.sleep(0.1)
        os._exit(EXIT_STOPPED_UNSAVED)
