"""The progress of a dry run on stderr: a bar on a terminal, some plain lines elsewhere."""

import sys
import time
from collections.abc import Iterable
from typing import TextIO

from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

_LINE_SECONDS = 30


class RankProgress:
    """Progress of one rank's process, the `number`-th of `count`."""

    def __init__(self, rank: int, number: int, count: int, stream: TextIO | None = None) -> None:
        self._label = f"rank {rank}" + (f" ({number} of {count})" if count > 1 else "")
        self._stream = stream or sys.stderr
        self._done = self._total = 0
        self._printed = time.monotonic()
        self._bar: tqdm[None] = tqdm(
            file=self._stream,
            position=number - 1,
            leave=False,
            bar_format="{desc} |{bar}| {n_fmt}/{total_fmt} blocks [{elapsed}]",
            disable=not self._stream.isatty(),
        )
        self.enter("building the model")

    def enter(self, phase: str) -> None:
        """Shows a phase at its start."""
        self._bar.set_description_str(f"{self._label}: {phase}")
        if self._bar.disable:
            self._print(phase)

    def watch(self, blocks: Iterable[nn.Module], micro_batches: int, optimizer: Optimizer) -> None:
        """Shows a step: its forward and backward passes block by block, then the optimizer."""
        blocks = list(blocks)
        self._total = 2 * len(blocks) * micro_batches
        self._bar.reset(self._total)
        for block in blocks:
            block.register_forward_hook(self._forward)
        optimizer.register_step_pre_hook(lambda *_: self.enter("optimizer"))

    def close(self) -> None:
        """Erases a terminal's bar."""
        self._bar.close()

    def _forward(self, _block: nn.Module, _inputs: object, output: Tensor) -> None:
        self._count("forward")
        if output.requires_grad:
            output.register_hook(lambda _: self._count("backward"))

    def _count(self, phase: str) -> None:
        self._done += 1
        self._bar.update()
        if not self._bar.disable:
            self.enter(phase)
        elif time.monotonic() - self._printed > _LINE_SECONDS:
            self._print(f"{phase}, {self._done} of {self._total} blocks")

    def _print(self, words: str) -> None:
        self._printed = time.monotonic()
        print(f"{self._label}: {words}", file=self._stream, flush=True)
