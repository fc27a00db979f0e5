"""Handling of steps whose loss or gradient norm is NaN or infinite."""

import itertools
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor


class NonFiniteError(RuntimeError):
    """A step was not finite, and the run ends; raised by every rank after the same step."""


class DeviceGuardedOptimizer(torch.optim.Optimizer):
    """An optimizer whose `step` decides on the device whether it has an effect."""

    def step(  # type: ignore[override]
        self,
        closure: Any = None,
        *,
        is_finite: Tensor | None = None,
        grad_scale: Tensor | None = None,
    ) -> None:
        """Divides gradients by `grad_scale` and steps if `is_finite`, else changes nothing.

        Both are scalars on the parameters' device, None: 1 and True. The host does not wait.
        """
        raise NotImplementedError


def step_if(optimizer: torch.optim.Optimizer, is_finite: Tensor, grad_scale: Tensor | None) -> None:
    """Steps the optimizer on gradients divided by `grad_scale` if `is_finite`, both scalars.

    With a fused or DeviceGuardedOptimizer the host does not wait: fused kernels read both on the
    device, as they do for torch.amp.GradScaler. With any other one the host waits for `is_finite`.
    """
    if isinstance(optimizer, DeviceGuardedOptimizer):
        optimizer.step(is_finite=is_finite, grad_scale=grad_scale)
    elif optimizer.defaults.get("fused"):
        optimizer.found_inf = (~is_finite).float()  # type: ignore[attr-defined]
        optimizer.grad_scale = grad_scale  # type: ignore[attr-defined]
        optimizer.step()
    elif is_finite:
        if grad_scale is not None:
            parameters = itertools.chain(*(group["params"] for group in optimizer.param_groups))
            torch._foreach_div_([p.grad for p in parameters if p.grad is not None], grad_scale)
        optimizer.step()


class NonFiniteGuard:
    """Keeps a step that is not finite from the weights: "skip" counts it, "stop" ends the run.

    What `is_finite` says is global, so that all ranks take the same decision. The numbers stay on
    the parameters' device. The host may learn of a bad step when the device has begun the next
    one, so that under "stop" no later step is applied either.
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
        grad_scale: Tensor | None,
        norms: Tensor,
        owners: Sequence[str],
    ) -> Tensor:
        if self.mode == "stop":
            is_good_so_far = self.skipped_steps == 0
            former = norms if self._norms is None else self._norms
            self._norms = torch.where(is_good_so_far, norms, former)
            self._owners = owners
            is_finite = is_finite & is_good_so_far
        step_if(optimizer, is_finite, grad_scale)
        self.skipped_steps = self.skipped_steps + ~is_finite
        return is_finite

    def bad_gradients(self) -> set[str]:
        assert self._norms is not None
        return {self._owners[i] for i in (~self._norms.isfinite()).nonzero().flatten().tolist()}

    def check(self, step: int, grad_norm: float) -> None:
        # The step monitor looks at every step.
        pass

    def metrics(self) -> dict[str, float]:
        return {"skipped_steps": self.skipped_steps.item()} if self.mode == "skip" else {}

    def state_dict(self) -> dict[str, float]:
        return self.metrics()

    def load_state_dict(self, state: dict[str, float]) -> None:
        if self.mode == "skip":
            self.skipped_steps.fill_(state.get("skipped_steps", 0))
