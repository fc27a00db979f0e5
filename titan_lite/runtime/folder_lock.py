"""A lock that allows one run at a time in a folder. Does not import torch."""

import errno
import fcntl
import json
import logging
import os
import socket
import time
from pathlib import Path
from typing import TextIO

logger = logging.getLogger(__name__)

LOCK_FILE = "lock"
# Waiting time for a former process of the same run to end, for example after a restart by torchrun.
LOCK_SECONDS = 3.0


class FolderLock:
    """Locks a run's folder until `release`, or until the process ends.

    It is a lock of the kernel on a file, so a killed process leaves none behind. It works between
    nodes on network file systems with locks (NFS 4; Lustre with -o flock).
    """

    def __init__(self, folder: Path, key: str = "job.dump_folder") -> None:
        """Raises ValueError with host and process of the run that has the lock; or OSError.

        key: the setting that names the folder.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._file: TextIO = (folder / LOCK_FILE).open("a+")
        deadline = time.monotonic() + LOCK_SECONDS
        while not self._try(folder):
            if time.monotonic() > deadline:
                holder = holder_of(self._file)
                self._file.close()
                raise ValueError(
                    f"{folder} is in use by another run ({holder}); stop it, or set another {key}"
                )
            time.sleep(0.1)
        holder = json.dumps({"host": socket.gethostname(), "pid": os.getpid()})
        self._file.truncate(0)
        try:
            # Without Python's buffer, which would fail again when the file is closed.
            os.write(self._file.fileno(), holder.encode())
        except OSError as error:
            self._file.close()
            raise OSError(error.errno, error.strerror, self._file.name) from error

    def release(self) -> None:
        """Releases the lock."""
        self._file.close()

    def _try(self, folder: Path) -> bool:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return False
            logger.warning(
                "%s is on a file system without locks (%s): a second run in it is not detected",
                folder,
                error.strerror,
            )
        return True


def holder_of(file: TextIO) -> str:
    """The holder of a lock, as written in the file."""
    file.seek(0)
    try:
        holder = json.loads(file.read())
        return f"process {holder['pid']} on {holder['host']}"
    except (ValueError, KeyError, TypeError):
        return "unknown process"
