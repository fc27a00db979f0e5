"""The device's name, peak and memory."""

import platform
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from titan_lite.config.schema import Metrics
from titan_lite.planner.hardware import NumberFormat, find_device

GIB = 2**30

# Large enough for nearly the best rate, and short enough (0.3 GFLOP, a few ms) to end before the
# system gives the core to another process. 1,024 would measure half the rate on a busy machine.
_MATMUL_SIZE = 512
_MATMUL_SECONDS = 0.2


@dataclass(frozen=True)
class PeakFlops:
    """The rate that MFU is relative to, in TFLOP/s of one device, and where it comes from.

    If tflops is None, `source` has the reason and the key to set.
    """

    tflops: float | None
    source: str


def find_peak(section: Metrics, device: torch.device, dtype: NumberFormat) -> PeakFlops:
    """The peak for matmuls in `dtype`: configured, or measured on CPU, or from the table."""
    if section.peak_tflops is not None:
        return PeakFlops(section.peak_tflops, "metrics.peak_tflops")
    if device.type == "cpu":
        source = f"{dtype} matmul measured at start, threads: {torch.get_num_threads()}"
        return PeakFlops(measured_peak_tflops(device, getattr(torch, dtype)), source)
    name = device_name(device)
    known = find_device(name)
    if known is None:
        return PeakFlops(None, f"no peak is known for device {name!r}; set metrics.peak_tflops")
    if dtype == "float32" and torch.get_float32_matmul_precision() != "highest":
        dtype = "tfloat32"
    tflops = known.tflops(dtype)
    if tflops is None:
        return PeakFlops(
            None,
            f"no {dtype} peak is known for {known.name} ({known.source}); set metrics.peak_tflops",
        )
    return PeakFlops(tflops, f"{known.name}, dense {dtype}, {known.source}")


def device_name(device: torch.device) -> str:
    """The name of an accelerator, as torch reports it, or of the CPU."""
    if device.type != "cpu":
        return str(torch.get_device_module(device).get_device_name(device))
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def measured_peak_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """The sum of the threads' best rates of a square matmul, in TFLOP/s; takes about 0.2 s.

    The best of the three matmuls of a linear layer, which differ in the transposed operand: for an
    emulated dtype, one can be 20 times as fast as another.

    Each thread has a separate matmul. In a shared one, all threads wait for the slowest, and one
    other busy process makes the best rate up to ten times too low.
    """
    n, threads = _MATMUL_SIZE, torch.get_num_threads()
    # A separate generator, so that the run's random numbers stay the same.
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, n, generator=generator).to(device, dtype) for _ in range(2))
    products = ((a, b.T), (a, b), (a.T, b))

    def rate(_thread: int) -> float:
        torch.set_num_threads(1)
        out = torch.empty_like(a)
        seconds = min(
            best_seconds(partial(torch.mm, *factors, out=out), _MATMUL_SECONDS / len(products))
            for factors in products
        )
        return 2 * n**3 / seconds / 1e12

    try:
        with ThreadPoolExecutor(threads) as pool:
            return sum(pool.map(rate, range(threads)))
    finally:
        # New threads use the number that was set last.
        torch.set_num_threads(threads)


def best_seconds(
    work: Callable[[], object], budget: float, clock: Callable[[], float] = time.perf_counter
) -> float:
    """The shortest time of the repetitions that start within `budget` seconds, at least one.

    Disturbances only make a repetition longer.
    """
    best, now = float("inf"), clock()
    deadline = now + budget
    while now < deadline:
        start, _ = now, work()
        now = clock()
        best = min(best, now - start)
    return best


class DeviceMemory:
    """The memory that this process uses on its device.

    Accelerators: the allocator's peaks since `reset_peak`. CPU: the peak resident set since the
    process started, which the system does not reset.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def snapshot(self) -> dict[str, float]:
        """Values by record key: GiB, and counts since the process started."""
        if self._device.type == "cpu":
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            unit = 1 if sys.platform == "darwin" else 1024
            return {"memory_gib": peak * unit / GIB}
        stats = torch.get_device_module(self._device).memory_stats(self._device)
        return {
            "memory_gib": stats["active_bytes.all.peak"] / GIB,
            "memory_reserved_gib": stats["reserved_bytes.all.peak"] / GIB,
            "alloc_retries": stats["num_alloc_retries"],
            "ooms": stats["num_ooms"],
        }

    def reset_peak(self) -> None:
        """Resets the peaks of an accelerator."""
        if self._device.type != "cpu":
            torch.get_device_module(self._device).reset_peak_memory_stats(self._device)
