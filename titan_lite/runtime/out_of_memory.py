"""Advice for a device that is out of memory."""

import re
from collections.abc import Sequence

import torch

from titan_lite.config.units import format_scaled


def describe_out_of_memory(
    error: torch.OutOfMemoryError, device: torch.device, advice: Sequence[str]
) -> str:
    """Returns the device's memory figures, and `advice`, one line each."""
    match = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", str(error))
    request = f" for a request of {match[1]}" if match else ""
    lines = [
        f"Out of memory on {device}{request}.",
        *_numbers(device),
        "What would help, cheapest first:",
    ]
    return "\n".join([*lines, *(f"  {line}" for line in advice)])


def _numbers(device: torch.device) -> list[str]:
    if device.type != "cuda":
        return []
    statistics = torch.cuda.memory_stats(device)
    free, total = torch.cuda.mem_get_info(device)
    return [
        f"  {label} {format_scaled(value, 'B', 1024)}"
        for label, value in (
            ("allocated", statistics["allocated_bytes.all.current"]),
            ("peak allocated", statistics["allocated_bytes.all.peak"]),
            ("reserved", statistics["reserved_bytes.all.current"]),
            (
                "reserved but fragmented (inactive split blocks)",
                statistics["inactive_split_bytes.all.current"],
            ),
            ("free on the device", free),
            ("total", total),
        )
    ]
