"""The planner's constants; assets/planner_constants.toml lists them with their sources."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import titan_lite
from titan_lite.config.cluster_file import read_toml

ASSETS = Path(titan_lite.__file__).resolve().parent.parent / "assets"
TABLES = read_toml(ASSETS / "planner_constants.toml")
LITERATURE: dict[str, float] = TABLES["literature"]
FITTED: dict[str, float] = TABLES["fitted"]
SPREADS: dict[str, float] = TABLES["spreads"]
KERNELS: dict[str, dict[str, Any]] = TABLES["kernels"]


def base_name(name: str) -> str:
    """The name in LITERATURE that covers this one, or "": "hbm" for "hbm/A100/llm-foundry"."""
    while name and name not in LITERATURE:
        name = name.rpartition("/")[0]
    return name


class Constants(dict[str, float]):
    """Constants for one device and software stack: the most specific entry of each name."""

    def __init__(self, values: Mapping[str, float], architecture: str, stack: str) -> None:
        super().__init__()
        self._values = values
        specific = f"/{architecture}/{stack}", f"/{architecture}"
        # Leonardo's custom A100 ("A100-64") uses the A100's entries if it has none.
        self._suffixes = *specific, *(s.replace("A100-64", "A100") for s in specific), ""

    def __missing__(self, name: str) -> float:
        known = (name + suffix for suffix in self._suffixes if name + suffix in self._values)
        self[name] = self._values[next(known)]
        return self[name]
