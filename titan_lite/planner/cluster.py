"""Clusters: the machines, network, price and power of a TOML file, shipped or of the user's."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from titan_lite.config.problems import did_you_mean, nearest, quote
from titan_lite.planner.constants import ASSETS, FITTED, LITERATURE, Constants
from titan_lite.planner.hardware import DEFAULT_MULTIPROCESSORS, DEVICES, Device, NumberFormat

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = ASSETS / "clusters"
# Name -> (bfloat16 and float8 peaks in TFLOP/s, rated W) of a part that has no datasheet: the
# datasheet's of the part that it is made of, which a power limit then slows.
CUSTOM = {"H100 SXM 96GB HBM2e": (989.4, 1978.9, 700.0)}
VALIDATED = ("A100", "A100-64", "H100")
"""Architectures that published runs validate."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Devices, nodes, network, price and power, and the constants that hold on them.

    node_nic_gbs: GB/s of a node in one direction. measured: constants that replace those of
    `values`, by the names of planner_constants.toml. calibrated: whether they come from this very
    machine.
    """

    name: str
    device: Device
    gpus_per_node: int = 8
    node_nic_gbs: float = 400.0
    price_per_gpu_hour: float = 0.0
    pue: float = 1.0
    host_watts: float = 0.0
    power_limit_w: float | None = None
    measured: Mapping[str, float] = field(default_factory=dict)
    calibrated: bool = False
    source: str = ""
    values: Mapping[str, float] = field(default_factory=lambda: LITERATURE | FITTED)

    def constants(self, stack: str = "") -> Constants:
        """The constants on this cluster under a software stack."""
        return Constants({**self.values, **self.measured}, self.device.architecture, stack)

    def peak(self, number_format: NumberFormat) -> float:
        """Dense peak in FLOP/s; of float32 where the device has no such format."""
        bf16, fp8, _ = CUSTOM.get(self.device.name, (None, None, None))
        custom = {"bfloat16": bf16, "float16": bf16, "float8": fp8}.get(number_format)
        dense = self.device.tflops(number_format) or custom or self.device.tflops("float16")
        return (dense or self.device.fp32_tflops or 0) * 1e12

    @property
    def limit_w(self) -> float:
        """Watts of a device at its power limit."""
        return self.power_limit_w or self.device.tdp_w or 0.0

    @property
    def throttle(self) -> float:
        """Share of the matmul rate under a power limit below the rated watts."""
        rated = CUSTOM.get(self.device.name, (0, 0, self.device.tdp_w))[2]
        return min(1.0, self.limit_w / rated) ** 0.75 if rated and self.limit_w else 1.0

    @property
    def hbm(self) -> float:
        """Bytes per second of the device memory."""
        return (self.device.hbm_gbs or 1000.0) * 1e9

    @property
    def link(self) -> float:
        """Bytes per second of the links to the other devices of a node, in one direction."""
        return (self.device.link_gbs or 64.0) / 2 * 1e9

    @property
    def memory(self) -> float:
        """Bytes of device memory, a vendor's GB taken for GiB."""
        return (self.device.memory_gb or 0.0) * 2**30


def find_cluster(name: str) -> Cluster:
    """Returns a shipped cluster by its name, or that of a TOML file; ValueError if it is wrong."""
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    known = sorted(file.stem for file in FOLDER.glob("*.toml"))
    if not path.is_file():
        hint = did_you_mean(nearest(name, known))
        raise ValueError(
            f"no cluster {quote(name)}{hint} (known: {', '.join(known)}; or a TOML file)"
        )
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from error
    return cluster_from(tables, path)


def cluster_from(tables: dict[str, Any], path: Path) -> Cluster:
    """Returns a cluster from the tables of its file; ValueError if a value is wrong."""

    def wrong(key: str, message: str) -> ValueError:
        return ValueError(f"{path}: {key}: {message}")

    tables = dict(tables)
    if "device" not in tables:
        raise wrong("device", "missing; expected a device of assets/devices.txt, or a table")
    device = tables.pop("device")
    if isinstance(device, dict):
        blank = dict.fromkeys(Device.__dataclass_fields__)
        if unknown := device.keys() - blank.keys():
            raise wrong(f"device.{min(unknown)}", f"unknown key (known: {', '.join(blank)})")
        own = {"architecture": str(device.get("name")), "multiprocessors": DEFAULT_MULTIPROCESSORS}
        resolved = Device(**{**blank, **own, "names": (), "source": str(path), **device})
    else:
        names = {known.name: known for known in DEVICES}
        if device not in names:
            hint = did_you_mean(nearest(str(device), list(names)))
            raise wrong("device", f"no device {quote(str(device))} in assets/devices.txt{hint}")
        resolved = names[device]
    numbers = ("gpus_per_node", "node_nic_gbs", "price_per_gpu_hour", "pue", "host_watts")
    known = {*numbers, "power_limit_w", "measured", "calibrated", "source"}
    if unknown := tables.keys() - known:
        hint = did_you_mean(nearest(min(unknown), sorted(known)))
        raise wrong(min(unknown), f"unknown key{hint}")
    for key in numbers:
        least = 1 if key in ("gpus_per_node", "pue") else 0
        if key not in tables:
            free = " (0 if the machines are free)" * (key == "price_per_gpu_hour")
            raise wrong(key, f"missing; expected a number of at least {least}{free}")
        value = tables[key]
        if isinstance(value, bool) or not isinstance(value, int | float) or value < least:
            raise wrong(key, f"expected a number of at least {least}, got {value!r}")
    for name, value in tables.get("measured", {}).items():
        if name.split("/")[0] not in {known.split("/")[0] for known in LITERATURE}:
            raise wrong(f"measured.{name}", "not a constant of assets/planner_constants.toml")
        if not isinstance(value, int | float) or value < 0:
            raise wrong(f"measured.{name}", f"expected a number of at least 0, got {value!r}")
    return Cluster(name=path.stem, device=resolved, **tables)
