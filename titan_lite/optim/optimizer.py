"""AdamW and Adam with weight-decay groups."""

import torch
from torch import nn

from titan_lite.config.schema import Optimizer

CLASSES: dict[str, type[torch.optim.Adam]] = {
    "AdamW": torch.optim.AdamW,
    "Adam": torch.optim.Adam,
}
FUSED_DEVICES = ("cuda", "cpu")


def parameter_kind(module: nn.Module, parameter_name: str) -> str:
    """ "norm", "bias", "embedding" or "weight", from the module that owns the parameter."""
    if isinstance(module, nn.RMSNorm | nn.LayerNorm):
        return "norm"
    if isinstance(module, nn.Embedding):
        return "embedding"
    return "bias" if parameter_name.endswith("bias") else "weight"


def build_optimizer(model: nn.Module, section: Optimizer) -> torch.optim.Adam:
    """The optimizer of all parameters, in groups with and without weight decay, if it has any."""
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    seen: set[nn.Parameter] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            # One that two modules share is of the first one's kind.
            if parameter in seen:
                continue
            seen.add(parameter)
            kind = parameter_kind(module, name)
            (kept if kind in section.no_decay else decayed).append(parameter)
    device_type = (decayed or kept)[0].device.type
    implementation = section.implementation
    if implementation == "auto":
        implementation = "fused" if device_type in FUSED_DEVICES else "foreach"
    groups = ((decayed, section.weight_decay), (kept, 0.0))
    return CLASSES[section.name](
        [{"params": params, "weight_decay": decay} for params, decay in groups if params],
        lr=section.lr,
        betas=(section.beta1, section.beta2),
        eps=section.eps,
        fused=implementation == "fused",
        foreach=implementation == "foreach",
    )


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr
