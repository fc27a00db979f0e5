"""The bundled corpus and tokenizer, in assets/ next to the package in the repository."""

from pathlib import Path

import titan_lite

ASSETS = Path(titan_lite.__file__).resolve().parent.parent / "assets"


def bundled_asset(name: str) -> Path:
    """Returns the path of a bundled file; ValueError naming it if it does not exist."""
    path = ASSETS / name
    if not path.is_file():
        raise ValueError(
            f"bundled file {path} does not exist: install titan_lite from a clone of its "
            "repository (pip install -e .), or set data.dataset_path and data.tokenizer_path"
        )
    return path
