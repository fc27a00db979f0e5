"""AdamW and Adam with moments in fewer than 32 bits."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from titan_lite.optim.nonfinite import DeviceGuardedOptimizer
from titan_lite.runtime.shards import to_local

# Moment -> True if it is signed.
MOMENTS = {"exp_avg": True, "exp_avg_sq": False}
# Elements of a quantized block, torchao's default.
BLOCK = 256
# Elements that are updated at once, in float32; a multiple of BLOCK.
CHUNK = 2**24


class LowPrecisionAdam(DeviceGuardedOptimizer):
    """Adam that computes in float32 and rounds the moments to `state_dtype`.

    With bfloat16, each element is rounded separately, so the step is the same in every layout. With
    "int8" and "float8", each block of 256 elements of a shard has a scale (arXiv:2110.02861), in
    torchao's tensors. decoupled: True for AdamW's weight decay, False for Adam's.
    """

    def __init__(
        self,
        groups: Any,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        decoupled: bool,
        state_dtype: str = "bfloat16",
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.decoupled = decoupled
        self.new_blocks = _new_blocks(state_dtype) if state_dtype != "bfloat16" else None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self._state(parameter)
                gradient = parameter.grad
                if gradient is None:
                    gradient = torch.zeros_like(parameter)
                step = state["step"] + 1
                tensors = [parameter, *(state[key] for key in MOMENTS)]
                flat = [to_local(tensor).view(-1) for tensor in tensors]
                flat.append(to_local(gradient).reshape(-1))
                for start in range(0, flat[0].numel(), CHUNK):
                    chunk = [_slice(tensor, start, start + CHUNK) for tensor in flat]
                    self._step(chunk, step, group)
                self.assign(state["step"], step)

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state |= {key: torch.zeros_like(parameter) for key in MOMENTS}
        for key, has_sign in MOMENTS.items():
            # The state is new, or torch loaded it in the dtype of the parameter.
            if self.new_blocks is None:
                state[key] = state[key].bfloat16()
            elif not _is_quantized(state[key]):
                blocks = self.new_blocks(parameter, has_sign)
                to_local(blocks).copy_(to_local(state[key]))
                state[key] = blocks
        return state

    def _step(self, chunk: Sequence[Tensor], step: Tensor, group: dict[str, Any]) -> None:
        weight, average, square, gradient = chunk
        (beta1, beta2), decay, lr = group["betas"], group["weight_decay"], group["lr"]
        if self.divisor is not None:
            gradient = gradient / self.divisor
        if not self.decoupled:
            gradient = gradient + decay * weight
        new_average = _float(average).lerp_(gradient, 1 - beta1)
        new_square = _float(square).mul_(beta2)
        new_square.addcmul_(gradient, gradient, value=1 - beta2)
        denominator = (new_square / (1 - beta2**step)).sqrt_().add_(group["eps"])
        update = new_average / denominator * (lr / (1 - beta1**step))
        kept = weight * (1 - lr * decay) if self.decoupled else weight
        self.assign(weight, kept - update)
        self.assign(average, new_average)
        self.assign(square, new_square)

    def assign(self, target: Any, value: Tensor) -> None:
        if self.is_finite is None or not _is_quantized(target):
            super().assign(target, value)
            return
        # Rounding a rounded value again would change it.
        parts = [target.codes.view(torch.uint8), target.scale]
        former = [part.clone() for part in parts]
        target.copy_(value)
        for part, before in zip(parts, former, strict=True):
            part.copy_(torch.where(self.is_finite, part, before))


def _new_blocks(state_dtype: str) -> Callable[[Tensor, bool], Tensor]:
    """Returns a function that makes zeros like a parameter, in 8 bits or in its own dtype.

    torchao does not quantize shards with fewer than 4096 elements, or without whole blocks.
    """
    import torchao.optim

    kind = torchao.optim.AdamW8bit if state_dtype == "int8" else torchao.optim.AdamWFp8
    return cast(Callable[[Tensor, bool], Tensor], kind([torch.zeros(())])._new_buffer)


def prepare_int8() -> None:
    """Makes torchao compute its code tables now, which it cannot do with fake tensors."""
    new_blocks = _new_blocks("int8")
    for has_sign in MOMENTS.values():
        new_blocks(torch.zeros(2**12), has_sign)


def _is_quantized(tensor: Tensor) -> bool:
    return hasattr(to_local(tensor), "codes")


def _slice(tensor: Any, start: int, end: int) -> Tensor:
    """Returns a view of a tensor of one dim; start and end are multiples of BLOCK."""
    if not _is_quantized(tensor):
        return cast(Tensor, tensor[start:end])
    names, settings = tensor.__tensor_flatten__()
    parts = {name: getattr(tensor, name) for name in names}
    parts["codes"] = parts["codes"][start:end]
    parts["scale"] = parts["scale"][start // BLOCK : end // BLOCK]
    return cast(Tensor, type(tensor).__tensor_unflatten__(parts, settings))


def _float(moment: Tensor) -> Tensor:
    """Returns a copy in float32."""
    return moment.dequantize() if _is_quantized(moment) else moment.to(torch.float32, copy=True)
