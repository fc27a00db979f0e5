"""The planner's constants, which assets/planner_constants.toml holds with their sources."""

import functools
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import titan_lite

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ASSETS = Path(titan_lite.__file__).resolve().parent.parent / "assets"
TABLES = tomllib.loads((ASSETS / "planner_constants.toml").read_text(encoding="utf-8"))
LITERATURE: dict[str, float] = TABLES["literature"]
FITTED: dict[str, float] = TABLES["fitted"]
SPREADS: dict[str, float] = TABLES["spreads"]


def base_name(name: str) -> str:
    """The name in LITERATURE that covers this one: "hbm" for "hbm/A100/llm-foundry"."""
    while name not in LITERATURE:
        name = name.rpartition("/")[0]
    return name


@dataclass(frozen=True)
class Constants:
    """Constants as one device and software stack see them."""

    values: Mapping[str, float]
    architecture: str = ""
    stack: str = ""

    def __getitem__(self, name: str) -> float:
        return self._found[name]

    @functools.cached_property
    def _found(self) -> "_Found":
        return _Found(self.values, self.architecture, self.stack)


class _Found(dict[str, float]):
    def __init__(self, values: Mapping[str, float], architecture: str, stack: str) -> None:
        super().__init__()
        self._values, self._suffixes = values, (f"/{architecture}/{stack}", f"/{architecture}", "")

    def __missing__(self, name: str) -> float:
        # Leonardo's A100 is an A100 where nothing more special is known.
        plain = [s.replace("A100-64", "A100") for s in self._suffixes]
        suffixes = (*self._suffixes[:2], *plain)
        self[name] = next(self._values[name + s] for s in suffixes if name + s in self._values)
        return self[name]
