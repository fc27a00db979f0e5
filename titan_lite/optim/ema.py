"""Exponential moving average of the weights, kept by each rank for its own shards."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from titan_lite.config.schema import EMA
from titan_lite.nn.init import CHECKPOINT_PREFIX
from titan_lite.runtime.shards import to_local


class WeightAverage:
    """The average of a model's weights, by element, so it is the same in every layout.

    tensors: averages by the parameters' names, with the parameters' placements; a tied parameter
    has an entry for each of its names.
    """

    def __init__(self, section: EMA, model: nn.Module) -> None:
        self.section = section
        averages = {weight: weight.detach().clone() for weight in model.parameters()}
        self._shards = [(to_local(w.detach()), to_local(a)) for w, a in averages.items()]
        self.tensors: dict[str, Tensor] = {}
        for name, weight in model.named_parameters(remove_duplicate=False):
            self.tensors[name.replace(CHECKPOINT_PREFIX, "")] = averages[weight]

    def restart(self) -> None:
        """Sets the average to the weights."""
        for weight, average in self._shards:
            average.copy_(weight)

    @torch.no_grad()
    def update(self, step: int, is_applied: Tensor) -> None:
        """Moves the average towards the weights if the step was applied; no host sync."""
        share = 1.0 if step <= self.section.start_step else 1 - self.section.decay
        for weight, average in self._shards:
            average.lerp_(weight, (is_applied * share).to(average))

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        """Swaps weights and averages inside the block, one parameter at a time."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for weight, average in self._shards:
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)
