"""The decision whether a step is applied."""

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor


class Guard(Protocol):
    """Steps the optimizer unless the loss or gradient norm is NaN or Inf; the same on all ranks."""

    @property
    def mode(self) -> Literal["stop", "skip", "rescale"]:
        """Reaction to a non-finite step: end the run, log a warning, or reduce `scale`."""

    @property
    def scale(self) -> Tensor | None:
        """Factor of the loss in backward, a scalar tensor; None: 1."""

    def is_finite(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Returns a bool scalar tensor, from the global loss and gradient norm."""

    def step(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        is_finite: Tensor,
        divisor: Tensor | None,
        norms: Tensor,
        owners: Sequence[str],
    ) -> Tensor:
        """Steps the optimizer (see `step_if`); returns whether the step was applied, a bool tensor.

        norms: (P,), norms of this rank's parts of the gradients. owners: the names of their P
        parameters, the same in each step.
        """

    def bad_gradients(self) -> set[str]:
        """Names of parameters with NaN or Inf gradients on this rank in the first bad step.

        Only for mode "stop".
        """

    def check(self, step: int, grad_norm: float) -> None:
        """Raises RuntimeError, on a log step, if the run has diverged."""

    def metrics(self) -> dict[str, float]:
        """Returns metrics for a log record; waits for the device."""

    def state_dict(self) -> dict[str, float]:
        """Returns numbers for a checkpoint; waits for the device."""

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restores the numbers of a checkpoint, which another kind of guard may have written."""
