"""Ends a process whose parent has gone, however that happened. No torch."""

import multiprocessing
import os
import threading
import time
from collections.abc import Callable

# Who starts a process that must not outlive it puts its own process id here.
PARENT = "TITAN_LITE_PARENT"
POLL_SECONDS = 0.5


def watch_parent(then: Callable[[], None]) -> None:
    """Calls `then`, in a thread, once the parent of this process has ended.

    The parent is known by its id, since it may have ended before this is called.
    """
    parent = os.environ.pop(PARENT, "") or os.getppid()
    threading.Thread(target=_wait, args=(int(parent), then), daemon=True).start()


def end_with_parent() -> None:
    """Ends this process of a pool of multiprocessing with the one that made the pool."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    assert parent.pid is not None
    threading.Thread(target=_wait, args=(parent.pid, lambda: os._exit(1)), daemon=True).start()


def _wait(parent: int, then: Callable[[], None]) -> None:
    # Polling works on every system; the process that adopts an orphan has another id.
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    then()
