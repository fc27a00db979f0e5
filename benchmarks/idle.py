"""The share of a step in which no kernel runs, because the device waits for the host to launch one.

On a CPU, operators are counted instead of kernels; the profiler slows them down, so the number has
little meaning there.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from benchmarks.manifest import DEVICE
from benchmarks.measure import Run, Values, take_turn

# Categories of events in kineto's Chrome traces.
DEVICE_WORK = {"kernel", "gpu_memcpy", "gpu_memset"} if DEVICE.type == "cuda" else {"cpu_op"}


def kernel_time() -> Values:
    """Profiles one turn: kernels per step, and seconds in which at least one kernel ran."""
    # Recording operators, too, would slow the host down.
    cuda = DEVICE.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        take_turn()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events: list[dict[str, Any]] = json.loads(trace.read_text())["traceEvents"]
    work = [event for event in events if event.get("cat") in DEVICE_WORK]
    spans = [(float(event["ts"]), float(event["ts"]) + float(event["dur"])) for event in work]
    return {
        "kernels_per_step": round(len(spans) / Run.turn, 1),
        "kernel_seconds_per_step": round(covered(spans) / 1e6 / Run.turn, 5),
    }


def covered(spans: list[tuple[float, float]]) -> float:
    """Returns the length of the union of the spans."""
    total = reached = 0.0
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def with_idle_share(result: Values) -> Values:
    """Adds the idle share of the median step, which is measured without the profiler."""
    share = 1 - result["kernel_seconds_per_step"] / result["seconds_per_step"]["median"]
    return result | {"idle_share": round(share, 4)}
