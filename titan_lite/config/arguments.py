"""The words of a command line: one configuration, and overrides."""

from collections.abc import Sequence
from itertools import pairwise


class UsageError(Exception):
    """Arguments or variables that cannot work."""


def split_arguments(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """The configuration, if there is one, and the overrides, in any order; or UsageError."""
    files = [argument for argument in argv if not argument.startswith("-")]
    for before, word in pairwise(argv):
        if word in files and before.startswith("--") and "." in before and "=" not in before:
            raise UsageError(f"{word!r} is not an override: write {before}={word}")
    if len(files) > 1:
        raise UsageError(f"expected one configuration, got {' and '.join(files)}")
    return next(iter(files), None), [word for word in argv if word.startswith("-")]
