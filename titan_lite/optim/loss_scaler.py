"""Dynamic loss scaling, for gradients in float16 (arXiv:1710.03740)."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from titan_lite.optim.nonfinite import step_if

# As torch.amp.GradScaler's.
INIT_SCALE = 65536.0
GROWTH_FACTOR = 2.0
BACKOFF_FACTOR = 0.5
GROWTH_INTERVAL = 2000
# Loss and gradients as they are: what overflows now has diverged.
MIN_SCALE = 1.0


class LossScaler:
    """The factor that keeps small gradients above float16's smallest number.

    Halved, down to MIN_SCALE, by a step whose gradient norm is not finite, and which is skipped;
    doubled after GROWTH_INTERVAL others in a row. torch.amp.GradScaler looks at the gradients that
    one rank holds; the norm is global, so that all ranks take the same decision. Its numbers stay
    on the parameters' device: with a fused optimizer no step waits for the host.
    """

    mode: Literal["rescale"] = "rescale"
    STATE = ("scale", "good_steps", "skipped_steps")

    def __init__(self, device: torch.device) -> None:
        self.scale = torch.full((), INIT_SCALE, device=device)
        self.good_steps = torch.zeros((), device=device)
        self.skipped_steps = torch.zeros((), device=device)

    def is_finite(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        return grad_norm.isfinite()

    def step(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        is_finite: Tensor,
        grad_scale: Tensor | None,
        norms: Tensor,
        owners: Sequence[str],
    ) -> Tensor:
        step_if(optimizer, is_finite, grad_scale)
        self.skipped_steps = self.skipped_steps + ~is_finite
        self.good_steps = torch.where(is_finite, self.good_steps + 1, 0)
        grows = self.good_steps == GROWTH_INTERVAL
        factor = torch.where(is_finite, torch.where(grows, GROWTH_FACTOR, 1.0), BACKOFF_FACTOR)
        self.scale = (self.scale * factor).clamp(min=MIN_SCALE)
        self.good_steps = torch.where(grows, 0, self.good_steps)
        return is_finite

    def bad_gradients(self) -> set[str]:
        return set()

    def check(self, step: int, grad_norm: float) -> None:
        if not math.isfinite(grad_norm) and self.scale.item() <= MIN_SCALE:
            raise RuntimeError(
                f"step {step}: the gradient norm is {grad_norm} though the loss is not scaled any "
                f"more, after {self.skipped_steps.item():.0f} skipped steps: the run has diverged"
            )

    def metrics(self) -> dict[str, float]:
        return {"loss_scale": self.scale.item(), "skipped_steps": self.skipped_steps.item()}

    def state_dict(self) -> dict[str, float]:
        return {name: getattr(self, name).item() for name in self.STATE}

    def load_state_dict(self, state: dict[str, float]) -> None:
        # A run in another precision leaves the number of skipped steps alone.
        for name in state:
            getattr(self, name).fill_(state[name])
