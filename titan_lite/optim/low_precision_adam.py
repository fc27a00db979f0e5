"""AdamW and Adam with moments in bfloat16: 4 bytes per parameter instead of 8."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from titan_lite.optim.nonfinite import DeviceGuardedOptimizer


class LowPrecisionAdam(DeviceGuardedOptimizer):
    """Adam that computes in float32 and rounds the moments to bfloat16.

    Each element is computed separately, so the step is the same in every layout. decoupled: True
    for AdamW's weight decay, False for Adam's.
    """

    def __init__(
        self,
        groups: Any,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        decoupled: bool,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.decoupled = decoupled

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Any = None,
        *,
        is_finite: Tensor | None = None,
        grad_scale: Tensor | None = None,
    ) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is None:
                    gradient = torch.zeros_like(parameter)
                if grad_scale is not None:
                    gradient = gradient / grad_scale
                self._step(parameter, _local(gradient), group, is_finite)

    def _step(
        self, parameter: Tensor, gradient: Tensor, group: dict[str, Any], is_finite: Tensor | None
    ) -> None:
        state, weight, lr = self.state[parameter], _local(parameter), group["lr"]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state |= {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
        for key in ("exp_avg", "exp_avg_sq"):
            # torch loads the state in the dtype of the parameter.
            state[key] = state[key].bfloat16()
        (beta1, beta2), decay = group["betas"], group["weight_decay"]
        if not self.decoupled:
            gradient = gradient + decay * weight
        step = state["step"] + 1
        average = _local(state["exp_avg"]).float().lerp_(gradient, 1 - beta1)
        square = _local(state["exp_avg_sq"]).float().mul_(beta2)
        square.addcmul_(gradient, gradient, value=1 - beta2)
        denominator = (square / (1 - beta2**step)).sqrt_().add_(group["eps"])
        update = average / denominator * (lr / (1 - beta1**step))
        kept = weight * (1 - lr * decay) if self.decoupled else weight
        for target, value in (
            (weight, kept - update),
            (_local(state["exp_avg"]), average),
            (_local(state["exp_avg_sq"]), square),
            (state["step"], step),
        ):
            target.copy_(value if is_finite is None else torch.where(is_finite, value, target))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
