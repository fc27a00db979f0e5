"""A plugin whose optimizer is any of torch.optim."""

from collections.abc import Sequence
from typing import Any, Literal

import torch

from titan_lite.config.optimizers import Optimizer, register_optimizer
from titan_lite.optim.optimizer import OptimizerContext, Parameter, torch_groups


class TorchOptimizer(Optimizer):
    """[optimizer] with name = "torch"."""

    name: Literal["torch"] = "torch"
    kind: str = "SGD"
    """A class of torch.optim."""
    settings: dict[str, Any] = {}  # noqa: RUF012
    """Its arguments."""


def build(
    section: TorchOptimizer, parameters: Sequence[Parameter], _: OptimizerContext
) -> torch.optim.Optimizer:
    """Builds it with the weight decay in the groups, unless the class has none."""
    groups = torch_groups(parameters)
    kind: Any = getattr(torch.optim, section.kind)
    if section.kind == "Rprop":
        for group in groups:
            del group["weight_decay"]
    optimizer: torch.optim.Optimizer = kind(groups, lr=section.lr, **section.settings)
    return optimizer


register_optimizer(TorchOptimizer, "tests.optim.torch_plugin:build")
