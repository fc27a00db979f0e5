"""The decision whether a step is applied."""

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor


class Guard(Protocol):
    """Steps the optimizer unless the loss or the gradient norm is NaN or Inf; all ranks alike."""

    @property
    def mode(self) -> Literal["stop", "skip", "rescale"]:
        """What follows such a step: the end of the run, a warning, or only another `scale`."""

    @property
    def scale(self) -> Tensor | None:
        """Factor of the loss in backward, a scalar; None: 1."""

    def is_finite(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """A bool scalar, from the global loss and gradient norm."""

    def step(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        is_finite: Tensor,
        grad_scale: Tensor | None,
        norms: Tensor,
        owners: Sequence[str],
    ) -> Tensor:
        """Steps the optimizer, see `step_if`; returns whether the step was applied, a bool scalar.

        norms: (P,), of this rank's parts of the gradients, owners: P names of parameters; the same
        in each step.
        """

    def bad_gradients(self) -> set[str]:
        """Under "stop", whose gradients on this rank were not finite in the first bad step."""

    def check(self, step: int, grad_norm: float) -> None:
        """Raises RuntimeError on a log step after which training on cannot help."""

    def metrics(self) -> dict[str, float]:
        """For a log record; waits for the device."""

    def state_dict(self) -> dict[str, float]:
        """Numbers for a checkpoint; waits for the device."""

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Of a checkpoint, which another kind of guard may have written."""
