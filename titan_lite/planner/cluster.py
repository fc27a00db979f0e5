"""Clusters: machines, network, price and power, read from a shipped or a user's TOML file."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from titan_lite.config.cluster_file import ClusterFile, DeviceTable, checked, read_toml
from titan_lite.config.problems import SettingError, did_you_mean, literal, nearest, quote
from titan_lite.planner.constants import ASSETS, FITTED, LITERATURE, Constants, base_name
from titan_lite.planner.hardware import DEFAULT_MULTIPROCESSORS, DEVICES, Device, NumberFormat

FOLDER = ASSETS / "clusters"
VALIDATED = ("A100", "A100-64", "H100")
"""Architectures on which published runs validate the planner."""
MAY_BE_ZERO = ("inner", "inner8", "kernel_us", "hop_us", "node_hop_us", "interference", "async_tp",
               "straggler", "straggler_ms", "attention_forward_tokens", "attention_backward_tokens",
               "idle_watts", "memory_watts", "waiting_watts")  # fmt: skip
"""Constants that may be 0: no formula divides by them."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Devices, nodes, network, price and power, and the constants that hold on them.

    node_nic_gbs: network bandwidth of a node in GB/s, in one direction. measured: constants that
    replace those in `values`, by their names in planner_constants.toml. calibrated: True if they
    were measured on these machines.
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
        """Dense peak in FLOP/s; that of float16 or float32 if this format's is not known.

        100 TFLOP/s if none is known, so that layouts on the device can still be compared.
        """
        dense = self.device.tflops(number_format) or self.device.tflops("float16")
        return (dense or self.device.fp32_tflops or 100.0) * 1e12

    @property
    def limit_w(self) -> float:
        """Watts of a device at its power limit."""
        return self.power_limit_w or self.device.tdp_w or 0.0

    @property
    def throttle(self) -> float:
        """Share of the matmul rate under a power limit below the rated watts."""
        rated = self.device.tdp_w
        return min(1.0, self.limit_w / rated) ** 0.75 if rated and self.limit_w else 1.0

    @property
    def hbm(self) -> float:
        """Bytes per second of the device memory."""
        return (self.device.hbm_gbs or 1000.0) * 1e9

    @property
    def memory(self) -> float:
        """Bytes of device memory; a vendor's GB are taken as GiB."""
        return (self.device.memory_gb or 0.0) * 2**30


def find_cluster(name: str) -> Cluster:
    """Returns a shipped cluster by name, or reads a TOML file; ValueError if there is none."""
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    known = sorted(file.stem for file in FOLDER.glob("*.toml"))
    if not path.is_file():
        hint = did_you_mean(nearest(name, known))
        raise ValueError(
            f"no cluster {quote(name)}{hint} (known: {', '.join(known)}; or a TOML file)"
        )
    tables = read_toml(path)
    device, measured = tables.pop("device", None), tables.pop("measured", {})
    try:
        known = [*ClusterFile.model_fields, "device", "measured"]
        values = checked(ClusterFile, tables, known).model_dump()
        _check_measured(measured)
        return Cluster(name=path.stem, device=_device(device, path), measured=measured, **values)
    except SettingError as error:
        raise ValueError(f"{path}: {error}") from error


def _device(value: object, path: Path) -> Device:
    if value is None:
        message = "missing; expected a name in assets/devices.txt, or a table"
        raise SettingError("device", message)
    if isinstance(value, dict):
        table = checked(DeviceTable, value, list(DeviceTable.model_fields), at="device.")
        values = table.model_dump() | {"names": (), "source": table.source or str(path)}
        values["architecture"] = table.architecture or table.name
        values["multiprocessors"] = table.multiprocessors or DEFAULT_MULTIPROCESSORS
        device = Device(**values)
    else:
        name, devices = str(value), {known.name: known for known in DEVICES}
        if name not in devices:
            hint = did_you_mean(nearest(name, list(devices)))
            raise SettingError("device", f"no device {quote(name)} in assets/devices.txt{hint}")
        device = devices[name]
    if not (device.bf16_tflops or device.fp16_tflops or device.fp32_tflops):
        raise SettingError("device", "has no peak: set bf16_tflops or fp32_tflops")
    return device


def _check_measured(measured: object) -> None:
    if not isinstance(measured, dict):
        raise SettingError("measured", f"expected a table, got {literal(measured)}")
    for name, value in measured.items():
        base, message = base_name(name), "not a constant of assets/planner_constants.toml"
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if base and is_number and (1e-9 <= value <= 1e9 or (not value and base in MAY_BE_ZERO)):
            continue
        if base:
            words = "0, or a number" if base in MAY_BE_ZERO else "a number"
            message = f"expected {words} from 1e-9 to 1e9, got {literal(value)}"
        raise SettingError(f"measured.{name}", message)
