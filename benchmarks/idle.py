"""How much of a step no kernel runs in: what the host, launching, makes the device wait.

On a CPU operators stand for kernels: the rest is Python's, and the profiler's, which slows
operators down, so that the number says little there.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from benchmarks.manifest import DEVICE
from benchmarks.measure import Run, Values, take_turn

# Of Chrome traces, as kineto writes them.
DEVICE_WORK = {"kernel", "gpu_memcpy", "gpu_memset"} if DEVICE.type == "cuda" else {"cpu_op"}


def kernel_time() -> Values:
    """Of one profiled turn: kernels per step, and the seconds in which at least one ran."""
    # Only what must be recorded: operators, too, would slow the host down.
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
    """Length of the union of the spans."""
    total = reached = 0.0
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def with_idle_share(result: Values) -> Values:
    """Adds the share of the median step, measured without the profiler, that kernels leave idle."""
    share = 1 - result["kernel_seconds_per_step"] / result["seconds_per_step"]["median"]
    return result | {"idle_share": round(share, 4)}
