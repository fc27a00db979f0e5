"""Signals that ask a run to end: noted when they come, answered between steps. No torch."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from titan_lite.runtime.progress import Progress

# EX_TEMPFAIL of sysexits.h: a checkpoint was saved, start again to go on from it.
EXIT_STOPPED = 75
# As of a process that SIGTERM ended: there is nothing to go on from.
EXIT_STOPPED_UNSAVED = 128 + signal.SIGTERM
# torchrun answers 1 for whatever a process returns: run_train.sh names a file for the code.
EXIT_CODE_FILE = "TITAN_LITE_EXIT_CODE_FILE"
# Seconds without progress after which SIGTERM ends a process after all. torchrun sends it to the
# processes that a dead one has left waiting, and kills them after 30 s.
TERM_GRACE = 25.0


class StopRequest:
    """Whether this process was asked to stop; `signal` names what asked."""

    def __init__(self, progress: Progress | None = None) -> None:
        self.signal: str | None = None
        self.progress = progress or Progress()

    def comes_within(self, seconds: float) -> bool:
        """Waits until this process is asked to stop, or the time is over."""
        deadline = time.monotonic() + seconds
        while self.signal is None and time.monotonic() < deadline:
            time.sleep(0.02)
        return self.signal is not None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Notes SIGTERM and SIGUSR1 inside, instead of ending the process; on the main thread.

        By a thread, since Python's own handlers wait until the main thread has come back from
        whatever library it is in.
        """
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        former_fd = signal.set_wakeup_fd(write_end)
        former = {
            number: signal.signal(number, lambda *_: None)
            for number in (signal.SIGTERM, signal.SIGUSR1)
        }
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
            if number[0] == signal.SIGTERM:
                threading.Thread(target=self._end_if_stuck, daemon=True).start()
            if number[0] in (signal.SIGTERM, signal.SIGUSR1):
                self.signal = signal.Signals(number[0]).name

    def _end_if_stuck(self) -> None:
        while self.progress.phase == "save" or self.progress.seconds() < TERM_GRACE:
            time.sleep(0.1)
        os._exit(EXIT_STOPPED_UNSAVED)


def exit_code_for_launcher(code: int) -> int:
    """What the process should return for its run to end with `code`, which is not 0.

    Started by run_train.sh it leaves the code in a file and returns 0: torchrun would take another
    one for a failure, and start the processes anew.
    """
    path = os.environ.get(EXIT_CODE_FILE)
    if not path:
        return code
    Path(path).write_text(str(code))
    return 0
