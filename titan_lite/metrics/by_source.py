"""Tokens and loss of each data source."""

from collections.abc import Sequence

import torch
from torch import Tensor

from titan_lite.config.schema import Data
from titan_lite.runtime.distributed import all_reduce


class SourceMeter:
    """Counts tokens of each source on the device; reads it on log steps only."""

    def __init__(self, section: Data) -> None:
        self._names = [source.name for source in section.sources]
        self._tokens = torch.zeros(len(self._names), dtype=torch.int64)

    def add(self, tokens: Tensor) -> None:
        """Counts a step's tokens of each source, of the whole job."""
        self._tokens = self._tokens.to(tokens.device) + tokens

    def state_dict(self) -> list[int]:
        """Returns the tokens of each source since step 0."""
        counts: list[int] = self._tokens.tolist()
        return counts

    def load_state_dict(self, state: Sequence[int]) -> None:
        self._tokens = torch.tensor(state)

    def metrics(
        self, losses: Tensor, tokens: Tensor, epochs: Sequence[Sequence[int]]
    ) -> dict[str, float]:
        """Returns metrics for a log record; collective.

        losses: this rank's part of each source's summed loss in the step. tokens: the whole job's
        tokens of each source in the step. epochs: for each source, how often each stream was read
        to its end; 0 for streams of other ranks. A source without tokens in the step has no loss.
        """
        sums = all_reduce(losses.double(), "sum").tolist()
        device = losses.device
        # Ranks that share a stream may differ in how far they have read it.
        ended = all_reduce(torch.tensor(epochs, device=device), "max").double().mean(1)
        values: dict[str, float] = {}
        for name, loss, count, total, epoch in zip(
            self._names, sums, tokens.tolist(), self.state_dict(), ended.tolist(), strict=True
        ):
            if count:
                values[f"source/{name}/loss"] = loss / count
            values |= {f"source/{name}/tokens": total, f"source/{name}/epochs": epoch}
        return values
