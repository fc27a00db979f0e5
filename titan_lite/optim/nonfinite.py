"""Handling of steps whose loss or gradient norm is NaN or Inf."""

import itertools
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor


class NonFiniteError(RuntimeError):
    """A NaN or Inf step that ends the run; every rank raises it after the same step."""


class DeviceGuardedOptimizer(torch.optim.Optimizer):
    """An optimizer whose `step` is a no-op if a flag on the device is false."""

    def step(  # type: ignore[override]
        self,
        closure: Any = None,
        *,
        is_finite: Tensor | None = None,
        divisor: Tensor | None = None,
    ) -> None:
        """Divides gradients by `divisor` (None: 1) and steps if `is_finite` (None: True).

        Both are scalars on the parameters' device, for which the host does not wait.
        """
        raise NotImplementedError


def step_if(optimizer: torch.optim.Optimizer, is_finite: Tensor, divisor: Tensor | None) -> None:
    """Steps the optimizer on gradients divided by `divisor` if `is_finite`, both scalars.

    The host does not wait with a DeviceGuardedOptimizer, nor with a fused optimizer, whose kernels
    read both on the device. With any other optimizer, the host waits for `is_finite`.
    """
    if isinstance(optimizer, DeviceGuardedOptimizer):
        optimizer.step(is_finite=is_finite, divisor=divisor)
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
    """Prevents non-finite steps from updating the weights: "skip" counts them, "stop" ends the run.

    `is_finite` is global, so that all ranks decide the same. The numbers stay on the parameters'
    device. With "stop", steps after the first bad one are not applied either: the host may read the
    result only after the device has started the next step.
    """

    def __init__(self, mode: Literal["stop", "skip"], device: torch.device) -> None:
        self.mode = mode
        self.scale = None
        self.skipped_steps = torch.zeros((), device=device)
        self._norms: Tensor | None = None
        self._owners: Sequence[str] = ()

    def is_finite(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
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
        assert self._norms is not None
        return {self._owners[i] for i in (~self._norms.isfinite()).nonzero().flatten().tolist()}

    def check(self, step: int, grad_norm: float) -> None:
        # StepMonitor reads every step's result.
        pass

    def metrics(self) -> dict[str, float]:
        return {"skipped_steps": self.skipped_steps.item()} if self.mode == "skip" else {}

    def state_dict(self) -> dict[str, float]:
        return self.metrics()

    def load_state_dict(self, state: dict[str, float]) -> None:
        if self.mode == "skip":
            self.skipped_steps.fill_(state.get("skipped_steps", 0))
