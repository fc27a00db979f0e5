"""Signals that ask a run to end: noted when they come, answered between steps. No torch."""

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

# What schedulers send before they take a node away.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# EX_TEMPFAIL of sysexits.h: the run is not over, start it again.
EXIT_STOPPED = 75
# torchrun answers 1 for whatever a process returns: run_train.sh names a file for the code.
EXIT_CODE_FILE = "TITAN_LITE_EXIT_CODE_FILE"


class StopRequest:
    """Whether this process was asked to stop; `signal` names what asked."""

    def __init__(self) -> None:
        self.signal: str | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Notes SIGNALS inside, instead of ending the process by them; on the main thread."""

        def note(number: int, _frame: FrameType | None) -> None:
            self.signal = signal.Signals(number).name

        former = {number: signal.signal(number, note) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)


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
