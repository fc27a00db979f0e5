"""Ends a run that cannot write with one sentence; no torch."""

import contextlib
from collections.abc import Iterator
from pathlib import Path


class WriteError(RuntimeError):
    """Something that a run keeps could not be written; the message has the file and the reason."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what the system refuses inside into a WriteError that names the path."""
    try:
        yield
    except OSError as error:
        raise WriteError(f"{path} cannot be written: {error.strerror or error}") from error


def make_new_folder(path: Path) -> Path:
    """Makes a folder that did not exist: `path`, or the first free one of path-2, path-3, ...

    A name from the clock may be taken: two runs can start within a second.
    """
    new, number = path, 1
    while True:
        try:
            new.mkdir(parents=True)
            return new
        except FileExistsError:
            number += 1
            new = path.with_name(f"{path.name}-{number}")
