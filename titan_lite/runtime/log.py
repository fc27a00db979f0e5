"""Logging to standard output: everything from rank 0, warnings from the other ranks."""

import contextlib
import functools
import hashlib
import logging
import os
import sys
from pathlib import Path

# Folder that the processes of one attempt on a node share; set by the launcher.
MESSAGES = "TITAN_LITE_MESSAGES"
# Set by torchrun: a file in a folder of the process, which is in a folder of the attempt.
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"


logger = logging.getLogger(__name__)


@functools.cache
def warn_once(message: str) -> None:
    """Logs a warning once per process, for code that a run calls several times."""
    logger.warning(message)


def set_up_streams() -> None:
    """Opens closed standard streams on the null device, so that no file gets their descriptors.

    Standard output escapes characters that its encoding does not have, as standard error does.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            os.dup2(os.open(os.devnull, os.O_RDWR), descriptor)
            os.set_inheritable(descriptor, True)
            setattr(sys, name, os.fdopen(descriptor, "w" if descriptor else "r"))
    # A program may have replaced the stream, or its descriptor.
    with contextlib.suppress(AttributeError, OSError):
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


class _Handler(logging.StreamHandler):  # type: ignore[type-arg]  # Generic from Python 3.11 on.
    """Drops lines that cannot be written, for example because the reader of a pipe has ended."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


# Modules whose warnings only rank 0 logs: they would be the same on every rank.
SAME_ON_ALL_RANKS = ("config", "training.preflight", "training.tokenizer_checks",
                     "checkpoint.state", "data.sources", "runtime.log")  # fmt: skip


def set_up_logging(rank: int) -> None:
    """Sends the package's log to standard output with the rank in each line."""
    handler = _Handler(sys.stdout)
    handler.setFormatter(
        logging.Formatter(f"%(asctime)s [rank{rank}] %(levelname)s %(message)s", datefmt="%H:%M:%S")
    )
    logger = logging.getLogger("titan_lite")
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    for name in SAME_ON_ALL_RANKS:
        logging.getLogger(f"titan_lite.{name}").setLevel(
            logging.WARNING if rank == 0 else logging.ERROR
        )


def is_first_to_print(text: str) -> bool:
    """Returns True if no other process of this node has printed the same text, and notes it.

    Always True if there is no launcher, and so no shared folder.
    """
    if MESSAGES in os.environ:
        folder = Path(os.environ[MESSAGES])
    elif ERROR_FILE in os.environ:
        folder = Path(os.environ[ERROR_FILE]).parent.parent
    else:
        return True
    try:
        (folder / hashlib.sha256(text.encode()).hexdigest()).touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        return True  # better twice than never: the disk may be full
    return True
