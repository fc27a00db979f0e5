"""How long each rank computes, of a step that takes all of them as long as the slowest."""

import statistics
import time
from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

# Of the last steps, so that no pause of the system's in one of them counts.
STEPS = 10


class ForwardTimes:
    """Times this rank's forward of each block, in the first micro-batch of a step.

    Between blocks a rank waits for the parameters that others send; within one it computes, except
    for what tensor and context parallel exchange there. Adds two readings of a clock per block, and
    no wait: of a GPU, they are events in its stream.
    """

    def __init__(
        self, blocks: Iterable[nn.Module], device: torch.device, *, compiled: bool
    ) -> None:
        """blocks: sharded already, since FSDP2 is to wait before the clock starts."""
        self._on_gpu = device.type == "cuda"
        self._steps: deque[dict[nn.Module, list[Any]]] = deque(maxlen=STEPS)
        # As FSDP2's own hooks: outside of the block's compiled graph.
        read_clock = torch.compiler.disable(self._read_clock) if compiled else self._read_clock
        for block in blocks:
            block.register_forward_pre_hook(read_clock)
            block.register_forward_hook(read_clock, prepend=True)

    def start_step(self) -> None:
        """Starts the next step."""
        self._steps.append({})

    def seconds(self) -> float:
        """Seconds of all blocks in the median of the last steps; 0.0 while these are too few.

        To be called when the device has done them.
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
