"""Builds the optimizer of a run: its parameters with their settings, and AdamW and Adam."""

import fnmatch
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from titan_lite.config.optimizers import BUILDERS, AdamOptimizer, Optimizer, OptimizerGroup
from titan_lite.config.problems import SettingError, did_you_mean, nearest, quote
from titan_lite.config.registry import load
from titan_lite.models.args import DecoderArgs
from titan_lite.models.roles import Kind, PlanRow, kind_of
from titan_lite.nn.init import CHECKPOINT_PREFIX
from titan_lite.optim.low_precision_adam import LowPrecisionAdam

FUSED_DEVICES = ("cuda", "cpu")


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """A parameter with its optimizer settings.

    name: in the whole model; for a tied head, that of the embedding. algorithm: one of the
    section's ALGORITHMS, or "": the builder chooses by `kind`.
    """

    name: str
    tensor: nn.Parameter
    kind: Kind
    lr_factor: float
    weight_decay: float
    algorithm: str


@dataclass(frozen=True, kw_only=True)
class OptimizerContext:
    """Facts of a run that an optimizer may depend on.

    ranks: the group of ranks that shard the same parameters; None: not sharded. param_dtype:
    training.param_dtype.
    """

    ranks: dist.ProcessGroup | None
    param_dtype: torch.dtype
    args: DecoderArgs


Builder = Callable[[Any, Sequence[Parameter], OptimizerContext], torch.optim.Optimizer]


def build_optimizer(
    model: nn.Module, section: Optimizer, plan: tuple[PlanRow, ...], context: OptimizerContext
) -> torch.optim.Optimizer:
    """Builds the optimizer with its registered builder. plan: of the model's family."""
    parameters = list(parameters_of(model, section, plan, tied_head=context.args.tied_head))
    build: Builder = load(BUILDERS[section.name][1])
    return build(section, parameters, context)


def parameters_of(
    model: nn.Module, section: Optimizer, plan: tuple[PlanRow, ...], *, tied_head: bool
) -> Iterator[Parameter]:
    """Yields the parameters of a model, or of a stage of it, with the settings of their groups."""
    for full_name, tensor in model.named_parameters():
        name = full_name.replace(CHECKPOINT_PREFIX, "")
        if tied_head and name == "output.weight":
            # The last stage has a copy of the first stage's embedding.
            name, decay_kind = "tok_embeddings.weight", "embedding"
        else:
            decay_kind = _decay_kind(model.get_submodule(full_name.rpartition(".")[0]), name)
        group = _group_of(section, name) or OptimizerGroup(pattern="*")
        decay = 0.0 if decay_kind in section.no_decay else section.weight_decay
        yield Parameter(
            name=name,
            tensor=tensor,
            kind=kind_of(name, plan),
            lr_factor=group.lr_factor,
            weight_decay=decay if group.weight_decay is None else group.weight_decay,
            algorithm=group.algorithm,
        )


def _decay_kind(module: nn.Module, name: str) -> str:
    """Returns the parameter's name in optimizer.no_decay, by the module that owns it."""
    if isinstance(module, nn.RMSNorm | nn.LayerNorm):
        return "norm"
    if isinstance(module, nn.Embedding):
        return "embedding"
    return "bias" if name.endswith("bias") else "weight"


def _group_of(section: Optimizer, name: str) -> OptimizerGroup | None:
    matching = (g for g in section.groups if fnmatch.fnmatchcase(name, g.pattern))
    return next(matching, None)


def check_groups(section: Optimizer, names: Sequence[str]) -> None:
    """Raises SettingError for a group without parameters. names: all of the model's."""
    taken = [_group_of(section, name) for name in names]
    for number, group in enumerate(section.groups, start=1):
        if any(other is group for other in taken):
            continue
        entry = f"table {number}: {quote(group.pattern)}"
        if any(fnmatch.fnmatchcase(name, group.pattern) for name in names):
            message = f"{entry} matches only parameters of earlier tables; put it before them"
        else:
            hint = did_you_mean(nearest(group.pattern, names))
            message = f"{entry} matches no parameter; the model has {names[0]} to {names[-1]}{hint}"
        raise SettingError("optimizer.groups", message)


def torch_groups(parameters: Sequence[Parameter]) -> list[dict[str, Any]]:
    """Returns groups for a torch.optim.Optimizer: the parameters by lr_factor and weight_decay."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for p in parameters:
        groups.setdefault((p.lr_factor, p.weight_decay), []).append(p.tensor)
    return [
        {"params": tensors, "lr_factor": factor, "weight_decay": decay}
        for (factor, decay), tensors in groups.items()
    ]


def build_adam(
    section: AdamOptimizer, parameters: Sequence[Parameter], _: OptimizerContext
) -> torch.optim.Optimizer:
    """Builds AdamW or Adam, with its state."""
    return with_state(adam(section, parameters))


def adam(section: AdamOptimizer, parameters: Sequence[Parameter]) -> torch.optim.Optimizer:
    """Returns AdamW or Adam, without state."""
    betas = (section.beta1, section.beta2)
    if section.state_dtype != "float32":
        return LowPrecisionAdam(
            torch_groups(parameters),
            lr=section.lr,
            betas=betas,
            eps=section.eps,
            decoupled=section.name != "Adam",
            state_dtype=section.state_dtype,
        )
    implementation = section.implementation
    if implementation == "auto":
        device_type = parameters[0].tensor.device.type
        implementation = "fused" if device_type in FUSED_DEVICES else "foreach"
    kind = torch.optim.Adam if section.name == "Adam" else torch.optim.AdamW
    return kind(
        torch_groups(parameters),
        lr=section.lr,
        betas=betas,
        eps=section.eps,
        fused=implementation == "fused",
        foreach=implementation == "foreach",
    )


def with_state(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Creates the state by a step with zero rate, decay and gradients, which is not counted.

    Ranks and checkpoints then have the same state whether or not a parameter has a gradient. Only
    for optimizers whose state such a step leaves at zero, or where its values do not matter.
    """
    settings = [dict(group) for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group |= {"lr": 0.0, "weight_decay": 0.0}
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for group, before in zip(optimizer.param_groups, settings, strict=True):
        group.clear()
        group.update(before)
    for state in optimizer.state.values():
        if isinstance(step := state.get("step"), torch.Tensor):
            step.zero_()
    return optimizer


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate of every group to lr x its lr_factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_factor", 1.0)
