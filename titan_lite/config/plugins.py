"""Imports the modules in job.plugins, which add rows to the registries."""

import importlib
import traceback
from collections.abc import Sequence

from titan_lite.config.problems import SettingError, quote


def import_plugins(modules: Sequence[str]) -> None:
    """Imports each module once per process; SettingError with the reason if one fails."""
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as error:
            raise SettingError("job.plugins", _failure(module, error)) from error


def _failure(module: str, error: Exception) -> str:
    message = f"cannot import {quote(module)}: {type(error).__name__}: {error}"
    # The first frame is in this file.
    frames = traceback.extract_tb(error.__traceback__)[1:]
    if own := [frame for frame in frames if "importlib" not in frame.filename]:
        return f"{message} ({own[-1].filename}, line {own[-1].lineno})"
    if isinstance(error, ModuleNotFoundError):
        return f"{message}; install its package, or put the folder that holds it on PYTHONPATH"
    return message
