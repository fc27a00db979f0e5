"""Dynamic loss scaling, for gradients in float16 (arXiv:1710.03740)."""

import math
from typing import Any

import torch
from torch import Tensor

from titan_lite.optim.nonfinite import NonFiniteGuard

# The defaults of torch.amp.GradScaler.
INIT_SCALE = 65536.0
GROWTH_FACTOR = 2.0
BACKOFF_FACTOR = 0.5
GROWTH_INTERVAL = 2000
# The loss is not scaled: if gradients still overflow, the run has diverged.
MIN_SCALE = 1.0


class LossScaler(NonFiniteGuard):
    """The factor that keeps small gradients above float16's smallest number.

    A step with a NaN or Inf gradient norm is skipped and halves the factor, down to MIN_SCALE;
    GROWTH_INTERVAL finite steps in a row double it. torch.amp.GradScaler checks the gradients of
    one rank; this one checks the global norm, so that all ranks decide the same. The numbers stay
    on the parameters' device: with a fused optimizer, the host does not wait for it.
    """

    scale: Tensor

    def __init__(self, device: torch.device) -> None:
        super().__init__("rescale", device)
        self.scale = torch.full((), INIT_SCALE, device=device)
        self.good_steps = torch.zeros((), device=device)

    def is_finite(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        return grad_norm.isfinite()

    def step(self, optimizer: torch.optim.Optimizer, *, is_finite: Tensor, **norm: Any) -> Tensor:
        super().step(optimizer, is_finite=is_finite, **norm)
        self.good_steps = torch.where(is_finite, self.good_steps + 1, 0)
        grows = self.good_steps == GROWTH_INTERVAL
        factor = torch.where(is_finite, torch.where(grows, GROWTH_FACTOR, 1.0), BACKOFF_FACTOR)
        self.scale = (self.scale * factor).clamp(min=MIN_SCALE)
        self.good_steps = torch.where(grows, 0, self.good_steps)
        return is_finite

    def check(self, step: int, grad_norm: float) -> None:
        if not math.isfinite(grad_norm) and self.scale.item() <= MIN_SCALE:
            raise RuntimeError(
                f"step {step}: the gradient norm is {grad_norm} at the minimum loss scale "
                f"({MIN_SCALE:g}), after {self.skipped_steps.item():.0f} skipped steps: the run "
                "has diverged. Resume from an earlier checkpoint with a lower optimizer.lr, or set "
                'training.param_dtype = "bfloat16"'
            )

    def metrics(self) -> dict[str, float]:
        return {"loss_scale": self.scale.item(), **super().metrics()}

    def state_dict(self) -> dict[str, float]:
        scale, good_steps = self.scale.item(), self.good_steps.item()
        return {"scale": scale, "good_steps": good_steps, **super().metrics()}

    def load_state_dict(self, state: dict[str, float]) -> None:
        super().load_state_dict(state)
        self.scale.fill_(state.get("scale", INIT_SCALE))
        self.good_steps.fill_(state.get("good_steps", 0))
