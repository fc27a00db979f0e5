"""Handling of steps whose loss or gradient norm is NaN or Inf."""

import itertools
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor


class NonFiniteError(RuntimeError):
    """A NaN or Inf step that ends the run; every rank raises it after the same step."""


class DeviceGuardedOptimizer(torch.optim.Optimizer):
    """An optimizer whose `step` reads two scalars on the device, for which the host does not wait.

    divisor: of the gradients; None: 1. is_finite: if false, `step` is a no-op; None: true.
    """

    divisor: Tensor | None = None
    is_finite: Tensor | None = None

    def assign(self, target: Tensor, value: Tensor) -> None:
        """Sets a parameter or state, in a finite step."""
        is_finite = self.is_finite
        target.copy_(value if is_finite is None else torch.where(is_finite, value, target))


def step_if(optimizer: torch.optim.Optimizer, is_finite: Tensor, divisor: Tensor | None) -> None:
    """Steps the optimizer on gradients divided by `divisor` if `is_finite`, both scalars.

    The host does not wait with a DeviceGuardedOptimizer, nor with a fused optimizer, whose kernels
    read both on the device. With any other optimizer, the host waits for `is_finite`.
    """
    if isinstance(optimizer, DeviceGuardedOptimizer):
        optimizer.is_finite, optimizer.divisor = is_finite, divisor
        optimizer.step()
    elif optimizer.defaults.get("fused"):
        optimizer.found_inf = (~is_finite).float()  # type: ignore[attr-defined]
        optimizer.grad_scale = divisor  # type: ignore[attr-defined]
        optimizer.step()
    elif is_finite:
        if divisor is not None:
            parameters = itertools.chain(*(group["params"] for group in optimizer.param_groups))
            torch._foreach_div_([p.grad for p in parameters if p.grad is not None], divisor)
        optimizer.step()


class NonFiniteGuard:
    """Prevents non-finite steps from updating the weights.

    mode: "skip" counts them, "stop" ends the run, "rescale" reduces `scale`. scale: factor of the
    loss in backward, a scalar tensor; None: 1.

    `is_finite` is global, so that all ranks decide the same. The numbers stay on the parameters'
    device. With "stop", steps after the first bad one are not applied either: the host may read the
    result only after the device has started the next step.
    """

    scale: Tensor | None = None

    def __init__(self, mode: Literal["stop", "skip", "rescale"], device: torch.device) -> None:
        self.mode = mode
        self.skipped_steps = torch.zeros((), device=device)
        self._norms: Tensor | None = None
        self._owners: Sequence[str] = ()

    def is_finite(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Returns a bool scalar tensor, from the global loss and gradient norm."""
        return (grad_norm + loss.to(grad_norm.device)).isfinite()

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
        if self.mode == "stop":
            is_good_so_far = self.skipped_steps == 0
            former = norms if self._norms is None else self._norms
            self._norms = torch.where(is_good_so_far, norms, former)
            self._owners = owners
            is_finite = is_finite & is_good_so_far
        step_if(optimizer, is_finite, divisor)
        self.skipped_steps = self.skipped_steps + ~is_finite
        return is_finite

    def bad_gradients(self) -> set[str]:
        """Names of parameters with NaN or Inf gradients on this rank in the first bad step.

        Only for mode "stop".
        """
        assert self._norms is not None
        return {self._owners[i] for i in (~self._norms.isfinite()).nonzero().flatten().tolist()}

    def check(self, step: int, grad_norm: float) -> None:
        """Raises RuntimeError, on a log step, if the run has diverged."""

    def metrics(self) -> dict[str, float]:
        """Returns metrics for a log record; waits for the device."""
        return {} if self.mode == "stop" else {"skipped_steps": self.skipped_steps.item()}

    def state_dict(self) -> dict[str, float]:
        """Returns numbers for a checkpoint; waits for the device."""
        return self.metrics()

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restores the numbers of a checkpoint, which a guard of another mode may have written."""
        if self.mode != "stop":
            self.skipped_steps.fill_(state.get("skipped_steps", 0))
