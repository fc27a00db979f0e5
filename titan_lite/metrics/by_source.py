"""Tokens and loss of each source of the data."""

from collections.abc import Sequence

import torch
from torch import Tensor

from titan_lite.metrics.meter import AllReduce


class SourceMeter:
    """Counts tokens of each source on the device; reads it on log steps only."""

    def __init__(self, names: Sequence[str], tokens: Sequence[int], all_reduce: AllReduce) -> None:
        """tokens: counted before this process, none in a run that starts afresh."""
        self._names = names
        self._tokens = torch.tensor(tokens or [0] * len(names))
        self._all_reduce = all_reduce

    def add(self, tokens: Tensor) -> None:
        """Counts a step's tokens of each source, of the whole job."""
        self._tokens = self._tokens.to(tokens.device) + tokens

    def tokens(self) -> list[int]:
        """Returns the tokens of each source since step 0."""
        counts: list[int] = self._tokens.tolist()
        return counts

    def metrics(
        self, losses: Tensor, tokens: Tensor, epochs: Sequence[Sequence[int]]
    ) -> dict[str, float]:
        """For a log record; collective.

        losses: of the step, this rank's part of the sum for each source; every part is on one rank
        only. tokens: of the step, of the whole job. epochs: of each source, how often each stream
        was read to its end, 0 where this rank does not know. A source without tokens in the step
        has no loss.
        """
        sums = self._all_reduce(losses.double(), "sum").tolist()
        device = losses.device
        # Ranks that share a stream may differ in how far they have read it.
        ended = self._all_reduce(torch.tensor(epochs, device=device), "max").double().mean(1)
        found: dict[str, float] = {}
        for name, loss, count, total, epoch in zip(
            self._names, sums, tokens.tolist(), self.tokens(), ended.tolist(), strict=True
        ):
            if count:
                found[f"source/{name}/loss"] = loss / count
            found |= {f"source/{name}/tokens": total, f"source/{name}/epochs": epoch}
        return found
