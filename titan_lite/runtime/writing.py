"""Reports files that cannot be written in one sentence. Does not import torch."""

import contextlib
from collections.abc import Iterator
from pathlib import Path


class WriteError(RuntimeError):
    """A file could not be written; the message has its path and the reason."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Converts an OSError in its context to a WriteError with the path."""
    try:
        yield
    except OSError as error:
        raise WriteError(f"{path} cannot be written: {error.strerror or error}") from error


def make_new_folder(path: Path) -> Path:
    """Makes a new folder: `path`, or the first of path-2, path-3, ... that does not exist.

    Names from the clock can collide: two runs can start within a second.
    """
    new, number = path, 1
    while True:
        try:
            new.mkdir(parents=True)
            return new
        except FileExistsError:
            number += 1
            new = path.with_name(f"{path.name}-{number}")
