"""Ends a process whose parent has ended for any reason. No torch."""

import contextlib
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator

from titan_lite.config.arguments import UsageError

# Variable with the id of the process whose end must end this one.
PARENT = "TITAN_LITE_PARENT"
# For messages about a process that was killed.
MAYBE_OUT_OF_MEMORY = "(possibly by the kernel's out-of-memory killer)"
POLL_SECONDS = 0.5


def watch_parent(then: Callable[[], None]) -> None:
    """Calls `then`, in a thread, once the parent of this process has ended.

    The parent is known by its id, since it may have ended before this is called.
    """
    parent = os.environ.pop(PARENT, "") or os.getppid()
    threading.Thread(target=_wait, args=(int(parent), then), daemon=True).start()


def end_with_parent() -> None:
    """Ends this worker of a multiprocessing pool when the process that made the pool ends."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    assert parent.pid is not None
    threading.Thread(target=_wait, args=(parent.pid, lambda: os._exit(1)), daemon=True).start()


@contextlib.contextmanager
def making_locks() -> Iterator[None]:
    """Raises UsageError if locks that processes share cannot be made inside."""
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"locks that processes share cannot be created: {error.strerror}; /dev/shm must be "
            "writable and have free space (in a container, --shm-size)"
        ) from error


def _wait(parent: int, then: Callable[[], None]) -> None:
    # Polling works on every system; the process that adopts an orphan has another id.
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    then()
