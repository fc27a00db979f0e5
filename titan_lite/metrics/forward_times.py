"""Measures how long each rank computes, although a step takes equally long on all ranks."""

import statistics
import time
from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

# Number of steps of which the median is taken, so that a pause in one of them does not count.
STEPS = 10


class ForwardTimes:
    """Times this rank's forward of each block, in the first micro-batch of a step.

    Between blocks a rank waits for parameters from other ranks. Within a block it computes, except
    for the collectives of tensor and context parallel. The cost is two clock readings per block and
    no synchronization: on a GPU, they are events in its stream.
    """

    def __init__(
        self, blocks: Iterable[nn.Module], device: torch.device, *, compiled: bool
    ) -> None:
        """blocks: already sharded, so that FSDP2's hooks wait before the clock starts."""
        self._on_gpu = device.type == "cuda"
        self._steps: deque[dict[nn.Module, list[Any]]] = deque(maxlen=STEPS)
        # Outside of the block's compiled graph, like FSDP2's own hooks.
        read_clock = torch.compiler.disable(self._read_clock) if compiled else self._read_clock
        for block in blocks:
            block.register_forward_pre_hook(read_clock)
            block.register_forward_hook(read_clock, prepend=True)

    def start_step(self) -> None:
        """Starts the next step."""
        self._steps.append({})

    def seconds(self) -> float:
        """Median over the last steps of the seconds of all blocks; 0.0 if there are too few steps.

        Must be called when the device has finished them.
        """
        if len(self._steps) < STEPS:
            return 0.0
        return statistics.median_low(sum(map(self._elapsed, s.values())) for s in self._steps)

    def _read_clock(self, block: nn.Module, *_: object) -> None:
        times = self._steps[-1].setdefault(block, []) if self._steps else []
        if len(times) < 2:
            times.append(self._now())

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _elapsed(self, times: list[Any]) -> float:
        begin, end = times
        return begin.elapsed_time(end) / 1000 if self._on_gpu else end - begin
