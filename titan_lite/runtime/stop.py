"""Signals that ask a run to end: noted when they come, handled between steps. No torch."""

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
# A mistake in the configuration, or a folder in use.
EXIT_MISTAKE = 2
# EX_TEMPFAIL of sysexits.h: a checkpoint was saved, from which the run resumes when started again.
EXIT_STOPPED = 75
# As of a process that SIGTERM ended: there is no checkpoint to resume from.
EXIT_STOPPED_UNSAVED = 128 + signal.SIGTERM
# Exit codes of a process that ended as requested.
ORDERLY = (0, EXIT_STOPPED, EXIT_STOPPED_UNSAVED)
# In the folder of MESSAGES, the name of the signal that the launcher got.
SENT = "signal"
STOPPING_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
# Seconds without progress after which SIGTERM ends a process at once. A launcher sends it to the
# processes that a dead one has left waiting, and kills them after 30 s.
TERM_GRACE = 25.0


def handled_signals() -> list[signal.Signals]:
    """Signals that ask to stop, without those that this process was started to ignore (nohup)."""
    return [number for number in STOPPING_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]


def worst_code(codes: Collection[int]) -> int:
    """The exit code of several processes together: mistakes first, then failures, then stops."""
    order = [EXIT_MISTAKE, EXIT_FAILED, EXIT_STOPPED_UNSAVED, EXIT_STOPPED, 0]
    known = [code if code in order else EXIT_FAILED for code in codes]
    return min(known, key=order.index)


def _sent(number: signal.Signals) -> str:
    """The name of the signal that was sent: a launcher passes on each one as SIGUSR1."""
    if number == signal.SIGUSR1 and MESSAGES in os.environ:
        with contextlib.suppress(OSError):
            return (Path(os.environ[MESSAGES]) / SENT).read_text()
    return number.name


class StopRequest:
    """A request to stop this process; `signal` names the signal, None before.

    progress: of this process; SIGTERM ends it at once after TERM_GRACE seconds in one phase.
    """

    def __init__(self, progress: Progress) -> None:
        self.signal: str | None = None
        self._progress = progress

    def launcher_has_gone(self) -> None:
        """Requests a stop because the process that started this one has ended."""
        self.signal = "its launcher has ended"
        self._end_if_stuck()

    def comes_within(self, seconds: float) -> bool:
        """Waits until a stop is requested, or the time is over."""
        deadline = time.monotonic() + seconds
        while self.signal is None and time.monotonic() < deadline:
            time.sleep(0.02)
        return self.signal is not None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Notes the signals inside, instead of ending the process; on the main thread.

        By a thread, since Python's own handlers wait until the main thread has come back from
        whatever library it is in.
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
            logger.info("Stopping after the current step; Ctrl-C again ends at once")
        if number == signal.SIGTERM:
            threading.Thread(target=self._end_if_stuck, daemon=True).start()
        self.signal = _sent(number)

    def _end_if_stuck(self) -> None:
        while self._progress.phase == "save" or self._progress.seconds() < TERM_GRACE:
            time.sleep(0.1)
        os._exit(EXIT_STOPPED_UNSAVED)
