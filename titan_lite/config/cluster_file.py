"""The tables of a cluster's TOML file, as titan-lite plan reads it."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field, ValidationError

from titan_lite.config.problems import SettingError, did_you_mean, expected, literal, nearest
from titan_lite.config.section import NonNegativeFloat, Positive, PositiveFloat, Section

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Table = TypeVar("Table", bound=Section)


class DeviceTable(Section):
    """[device] of a cluster's file: a part that assets/devices.txt does not have."""

    name: str
    bf16_tflops: PositiveFloat | None = None
    fp16_tflops: PositiveFloat | None = None
    fp8_tflops: PositiveFloat | None = None
    tf32_tflops: PositiveFloat | None = None
    fp32_tflops: PositiveFloat | None = None
    memory_gb: PositiveFloat | None = None
    hbm_gbs: PositiveFloat | None = None
    link_gbs: PositiveFloat | None = None
    tdp_w: PositiveFloat | None = None
    architecture: str = ""
    multiprocessors: Positive | None = None
    source: str = ""


class ClusterFile(Section):
    """The keys of a cluster's file next to its device and the measured constants."""

    gpus_per_node: Positive
    node_nic_gbs: PositiveFloat
    price_per_gpu_hour: NonNegativeFloat
    pue: Annotated[float, Field(ge=1)]
    host_watts: NonNegativeFloat
    power_limit_w: PositiveFloat | None = None
    calibrated: bool = False
    source: str = ""


def read_toml(path: Path) -> dict[str, Any]:
    """Returns the tables of a file; ValueError if it is not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from error


def checked(schema: type[Table], table: Mapping[str, Any], known: list[str], at: str = "") -> Table:
    """Returns a table of a file whose keys start with `at`; SettingError for a wrong key or value.

    known: keys that a misspelt one may mean.
    """

    try:
        return schema.model_validate(table)
    except ValidationError as error:
        kinds = {str(one["loc"][0]): one["type"] for one in error.errors()}
    # A misspelt key explains the one that is missing.
    key = next((key for key, kind in kinds.items() if kind == "extra_forbidden"), min(kinds))
    if key not in schema.model_fields:
        raise SettingError(at + key, f"unknown key{did_you_mean(nearest(key, known))}")
    free = " (0 if the machines are free)" * (key == "price_per_gpu_hour")
    start = "missing; " * (kinds[key] == "missing")
    end = free if start else f", got {literal(table[key])}"
    raise SettingError(at + key, f"{start}expected {expected(schema.model_fields[key])}{end}")
