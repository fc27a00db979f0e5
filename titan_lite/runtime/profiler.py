"""Profiler traces and CUDA memory snapshots, both off by default."""

import contextlib
import logging
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from titan_lite.config.rules import PROFILED_STEPS
from titan_lite.config.schema import Profiling

logger = logging.getLogger(__name__)

WARMUP_STEPS = 3
# Events in the allocator's history: enough for several steps, about 100 bytes each.
MEMORY_HISTORY_EVENTS = 100_000


def check_profiling(section: Profiling, device: torch.device) -> None:
    """Raises ValueError for a memory snapshot on a device without an allocation history."""
    if section.enable_memory_snapshot and device.type != "cuda":
        raise ValueError(
            f"memory snapshots require a CUDA device, got {device.type}; set "
            "profiling.enable_memory_snapshot = false"
        )


class Profiler(contextlib.ExitStack):
    """Writes the traces and snapshots of [profiling] below `folder`, for steps in its context.

    A Chrome trace `traces/step-N/rankR.json.gz` holds the last 3 steps of each period of
    `profile_freq` steps. An out-of-memory error writes a last memory snapshot and is raised again.
    """

    def __init__(self, section: Profiling, folder: Path, rank: int) -> None:
        super().__init__()
        self._section, self._folder, self._rank = section, folder, rank
        self._callbacks: list[Callable[[int], None]] = []

    def __enter__(self) -> "Profiler":
        where = self._section.profile_freq, self._folder, self._rank
        if self._section.enable_profiling:
            self._callbacks.append(self.enter_context(_traces(*where)))
        if self._section.enable_memory_snapshot:
            self._callbacks.append(self.enter_context(_snapshots(*where)))
        return self

    def after_step(self, step: int, _: object = None) -> None:
        for callback in self._callbacks:
            callback(step)


@contextlib.contextmanager
def _traces(freq: int, folder: Path, rank: int) -> Iterator[Callable[[int], None]]:
    last_step = steps_seen = 0

    def write(profiler: torch.profiler.profile) -> None:
        if steps_seen % freq != 0:
            return  # the run ended within a period
        path = folder / "traces" / f"step-{last_step}" / f"rank{rank}.json.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(path))
        logger.info("Profiler trace of step %d written to %s", last_step, path)

    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    active = PROFILED_STEPS
    warmup = min(WARMUP_STEPS, freq - active)
    with torch.profiler.profile(
        activities=activities,
        schedule=torch.profiler.schedule(wait=freq - warmup - active, warmup=warmup, active=active),
        on_trace_ready=write,
        record_shapes=True,
        acc_events=True,
    ) as profiler:

        def after_step(step: int) -> None:
            nonlocal last_step, steps_seen
            last_step = step
            steps_seen += 1
            profiler.step()

        yield after_step


@contextlib.contextmanager
def _snapshots(freq: int, folder: Path, rank: int) -> Iterator[Callable[[int], None]]:
    def write(name: str) -> None:
        path = folder / "memory" / name / f"rank{rank}.pickle"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            pickle.dump(torch.cuda.memory._snapshot(), file)
        logger.info("Memory snapshot written to %s", path)

    def after_step(step: int) -> None:
        if step % freq == 0:
            write(f"step-{step}")

    torch.cuda.memory._record_memory_history(max_entries=MEMORY_HISTORY_EVENTS)
    try:
        yield after_step
    except torch.OutOfMemoryError:
        write("out-of-memory")
        raise
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
