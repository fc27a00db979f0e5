"""Datasheet peaks of training accelerators, found by the name that the driver reports."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from titan_lite.planner.constants import ASSETS

NumberFormat = Literal["bfloat16", "float16", "float8", "tfloat32", "float32"]
"""Input format of a matmul."""
PEAKS: dict[NumberFormat, str] = {"bfloat16": "bf16", "float16": "fp16", "float8": "fp8",
                                  "tfloat32": "tf32", "float32": "fp32"}  # fmt: skip
DEFAULT_MULTIPROCESSORS = 108


@dataclass(frozen=True)
class Device:
    """One device as torch counts them: half a module for MI250X, a core for TPU v7.

    names: names that the driver reports, without a leading "NVIDIA" or "AMD", in any case.
    *_tflops: dense matmul peaks (no sparsity), accumulated in float32 as PyTorch does, in TFLOP/s;
    None where the device has no such format or no value was found. memory_gb: the GB of the
    device's name, which are counted as GiB. hbm_gbs: of the device memory, in GB/s. link_gbs: GB/s
    of the links to other devices, both directions together. tdp_w: W at the default power limit.
    architecture: its name in the planner's constants. source: where the peaks come from, and which
    values could not be verified.
    """

    name: str
    names: tuple[str, ...]
    bf16_tflops: float | None
    fp16_tflops: float | None
    fp8_tflops: float | None
    tf32_tflops: float | None
    fp32_tflops: float | None
    memory_gb: float | None
    hbm_gbs: float | None
    link_gbs: float | None
    tdp_w: float | None
    architecture: str
    multiprocessors: int
    source: str

    def tflops(self, number_format: NumberFormat) -> float | None:
        """Dense peak of matmuls in this format, in TFLOP/s, or None where none is known."""
        peak: float | None = getattr(self, f"{PEAKS[number_format]}_tflops")
        return peak


def find_device(device_name: str) -> Device | None:
    """The device of this name, as torch.cuda.get_device_name reports it, or None.

    The whole name must match: a slice ("NVIDIA H100 80GB HBM3 MIG 1g.10gb"), a laptop part or a
    sibling that is not in the table is unknown, and never gets the values of a similar device.
    """
    return _BY_NAME.get(_normalize(device_name))


def find_by_short_name(name: str) -> Device | None:
    """The first device whose name in the table starts with these words, in any case."""
    words = name.lower().replace("-", " ").replace("_", " ").split()
    names = ((device, device.name.lower().split()) for device in DEVICES)
    return next((d for d, name in names if words and name[: len(words)] == words), None)


def _normalize(name: str) -> str:
    words = name.lower().split()
    return " ".join(words[1:] if words[:1] in (["nvidia"], ["amd"]) else words)


def _read() -> Iterator[Device]:
    for line in (ASSETS / "devices.txt").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            name, names, *numbers, architecture, count, source = map(str.strip, line.split("|"))
            values: list[Any] = [float(number) if number else None for number in numbers]
            values += [architecture or name, int(count or DEFAULT_MULTIPROCESSORS), source]
            yield Device(name, tuple(names.split(", ")), *values)


DEVICES = tuple(_read())
_BY_NAME = {_normalize(name): device for device in DEVICES for name in device.names}
