"""A progress bar on the last line of a terminal, with the remaining time."""

import logging
import math
from contextlib import ExitStack
from typing import TextIO

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from tqdm.std import EMA

from titan_lite.metrics.record import Record


class ProgressLine:
    """A tqdm bar below the last record; it appears with the first record.

    Log messages of the package are printed above it.
    """

    def __init__(self, num_steps: int, stream: TextIO) -> None:
        self._num_steps, self._stream = num_steps, stream
        self._loss = EMA(smoothing=0.1)
        self._bar: tqdm[None] | None = None
        self._open = ExitStack()
        self._open.enter_context(logging_redirect_tqdm([logging.getLogger("titan_lite")]))

    def write(self, line: str, record: Record) -> None:
        """Prints a line above the bar, and draws the bar of the record's step."""
        tqdm.write(line, file=self._stream)
        step = int(record["step"])
        if math.isfinite(record["loss"]):
            self._loss(record["loss"])
        if step >= self._num_steps:
            self.close()
            return
        if self._bar is None:
            # Starts here, so that its rate does not include compilation and start-up.
            self._bar = self._open.enter_context(
                tqdm(
                    total=self._num_steps,
                    initial=step,
                    file=self._stream,
                    leave=False,
                    dynamic_ncols=True,
                    smoothing=0.1,
                    ascii=" =",
                    bar_format="{n_fmt}/{total_fmt} steps, {remaining} left{postfix} [{bar:20}]",
                )
            )
        self._bar.update(step - self._bar.n)
        tokens = tqdm.format_sizeof(record["tokens"])
        self._bar.set_postfix_str(f"smoothed loss {self._loss():.4f}, {tokens} tokens")

    def close(self) -> None:
        """Erases the bar."""
        self._open.close()
