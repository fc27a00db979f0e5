"""Tables of choices by name; plugins add rows to them."""

import importlib
import json
from collections import UserDict
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

T = TypeVar("T")


class Registry(UserDict[str, T]):
    """Rows by name, built-in ones first. As an annotation of a key, it accepts only these names."""

    def __init__(self, noun: str, rows: Mapping[str, T] | None = None) -> None:
        super().__init__(rows)
        self._noun = noun

    def register(self, name: str, row: T) -> None:
        """Adds a row; ValueError if the name has another one."""
        if self.setdefault(name, row) != row:
            raise ValueError(
                f"another {self._noun} is already registered as {json.dumps(name)}; "
                "choose another name"
            )

    def __get_pydantic_core_schema__(
        self, source: type[Any], handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        """Validates a name."""
        return core_schema.no_info_after_validator_function(self._known, handler(source))

    def _known(self, name: str) -> str:
        if name not in self:
            raise ValueError(f"no {self._noun} {json.dumps(name)}")
        return name


def load(path: str) -> Callable[..., Any]:
    """Imports "module:function"; ValueError if there is no such function."""
    module, _, name = path.partition(":")
    function: Callable[..., Any] | None = getattr(importlib.import_module(module), name, None)
    if function is None:
        raise ValueError(f'must be an existing "module:function", got {json.dumps(path)}')
    return function


SOURCES: Registry[str] = Registry("data source")
"""Prefix of data.dataset ("s3" for "s3://...") or suffix of data.dataset_path (".zarr") ->
"module:function", which gets [data], [validation] or a table of data.sources, and returns a
data.plugin_source.PluginSource."""

SINKS: Registry[str] = Registry(
    "metric sink",
    {
        "console": "titan_lite.metrics.sinks:ConsoleSink",
        "jsonl": "titan_lite.metrics.sinks:JsonlSink",
        "tensorboard": "titan_lite.metrics.tensorboard_sink:TensorBoardSink",
        "wandb": "titan_lite.metrics.sinks:WandbSink",
    },
)
"""Name -> "module:function", which gets a metrics.sinks.Destination and returns a Sink."""
