"""Float8 with torchao: the linears to convert, the problems of a layout, and the scales.

A linear's three matrix products round their operands to 8 bits, scaled by their largest element
(arXiv:2209.05433); weights, sums and everything between linears keep their precision. torchao is
imported where it is used: a run without float8 need not wait for it.
"""

import dataclasses
import logging
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
)

from titan_lite.config.dims import ParallelDims
from titan_lite.config.problems import SettingError, quote
from titan_lite.config.schema import Float8, Parallel
from titan_lite.models.patterns import matches
from titan_lite.models.roles import PlanRow, Role, kind_of
from titan_lite.nn.transformer import Transformer
from titan_lite.runtime.shards import to_local, with_local

logger = logging.getLogger(__name__)

# Divisor of rows and columns that torch._scaled_mm requires.
MULTIPLE = 16
# Ada is the first with float8 matmuls; Hopper is 9.0.
MIN_CAPABILITY = (8, 9)
TORCHAO_NAMES = {"rowwise_gw_hp": "rowwise_with_gw_hp"}


def choose_linears(
    model: Transformer, section: Float8, plan: tuple[PlanRow, ...]
) -> tuple[tuple[str, ...], dict[str, str]]:
    """Returns the names of the linears to convert, and the reason for each of the others."""
    chosen, left_out = [], {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            if reason := _reason_against(name, module, section, plan):
                left_out[name] = reason
            else:
                chosen.append(name)
    return tuple(chosen), left_out


def _reason_against(
    name: str, linear: nn.Linear, section: Float8, plan: tuple[PlanRow, ...]
) -> str | None:
    shape = (linear.out_features, linear.in_features)
    size = f"{shape[0]} x {shape[1]}"
    if _role(name, plan) == "head":
        return "the output head"
    is_whole = _role(name, plan) in ("sequence", "whole")
    if is_whole and kind_of(f"{name}.weight", plan) != "matrix":
        return "a head's, whole on every rank"
    if type(linear) is not nn.Linear:
        # torchao's linear would replace the class, including its forward.
        return f"a {type(linear).__name__}"
    if any(matches(pattern, name) for pattern in section.filter):
        return "float8.filter"
    if any(size % MULTIPLE for size in shape):
        return f"{size}, not multiples of {MULTIPLE}"
    if min(shape) < section.min_dim:
        return f"{size}, float8.min_dim is {section.min_dim}"
    return None


def summarize_left_out(left_out: Mapping[str, str]) -> str:
    """Lists the linears left out with the reasons; equal ones of several layers are one entry."""
    parts = dict.fromkeys(f"{_pattern(name)} ({reason})" for name, reason in left_out.items())
    return ", ".join(parts)


def _pattern(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def _role(name: str, plan: tuple[PlanRow, ...]) -> Role | None:
    return next((row.role for row in plan if row.matches(name)), None)


def float8_problems(
    model: Transformer,
    plan: tuple[PlanRow, ...],
    *,
    float8: Float8,
    parallel: Parallel,
    dims: ParallelDims,
    device: torch.device,
) -> Iterator[SettingError]:
    """Yields the reasons why this model cannot train in float8 on this device and layout."""
    if float8.recipe == "none":
        return
    yield from _device_problems(float8, parallel, dims, device)
    yield from _choice_problems(model, float8, plan)
    yield from _layout_problems(model, float8, plan, dims)


def _device_problems(
    float8: Float8, parallel: Parallel, dims: ParallelDims, device: torch.device
) -> Iterator[SettingError]:
    recipe = quote(float8.recipe)
    if not float8.emulate and (device_name := _unsupported_device(device)):
        yield SettingError(
            "float8.recipe",
            f"{recipe} requires CUDA compute capability >= 8.9, but {device_name}; set "
            "float8.emulate = true to emulate it (slow)",
        )
    gathers_float8 = float8.recipe == "tensorwise" and dims.tp > 1 and parallel.sequence_parallel
    if gathers_float8 and device.type == "cpu":
        yield SettingError(
            "float8.recipe",
            f"{recipe} with sequence parallel sends float8 activations, which gloo, the backend of "
            'CPUs, does not support; set parallel.sequence_parallel = false, or use "rowwise"',
        )


def _choice_problems(
    model: Transformer, float8: Float8, plan: tuple[PlanRow, ...]
) -> Iterator[SettingError]:
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for pattern in float8.filter:
        if not any(matches(pattern, name) for name in linears):
            names = ", ".join(dict.fromkeys(map(_pattern, linears)))
            yield SettingError(
                "float8.filter", f"{quote(pattern)} matches no linear; the model has {names}"
            )
    chosen, left_out = choose_linears(model, float8, plan)
    if not chosen:
        yield SettingError(
            "float8.recipe",
            f"{quote(float8.recipe)} finds no linear to convert: {summarize_left_out(left_out)}",
        )


def _layout_problems(
    model: Transformer, float8: Float8, plan: tuple[PlanRow, ...], dims: ParallelDims
) -> Iterator[SettingError]:
    chosen, _ = choose_linears(model, float8, plan)
    # Equal linears of several layers get one sentence.
    for pattern, name in {_pattern(name): name for name in reversed(chosen)}.items():
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        rows, role = linear.out_features, _role(name, plan)
        by_columns, tp = role == "rowwise", 1 if role == "whole" else dims.tp
        size = linear.in_features if by_columns else rows
        if size % (tp * MULTIPLE):
            yield SettingError(
                "parallel.tp",
                f"{pattern} has {size} {'columns' if by_columns else 'rows'}, {size / dims.tp:g} "
                f"on each of tp ({dims.tp}) ranks; float8 requires a multiple of {MULTIPLE}: add "
                f"{quote(pattern)} to float8.filter",
            )
        local_rows = rows if by_columns else rows // tp
        if float8.fsdp_all_gather and local_rows % dims.fsdp:
            yield SettingError(
                "float8.fsdp_all_gather",
                f"the {local_rows} rows of {pattern} must be a multiple of the FSDP degree "
                f"({dims.fsdp}): add {quote(pattern)} to float8.filter",
            )


def _unsupported_device(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"this device is a {device.type.upper()}"
    capability = torch.cuda.get_device_capability(device)
    if capability >= MIN_CAPABILITY:
        return None
    return f"{torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}"


def convert(model: Transformer, section: Float8, plan: tuple[PlanRow, ...]) -> tuple[str, ...]:
    """Replaces the chosen linears by torchao's in place, and returns their names.

    Parameters keep their names, shapes and float32 values. With fsdp_all_gather they are wrapped in
    a tensor subclass, whose hooks cast them for FSDP2's all-gather.
    """
    if section.recipe == "none":
        return ()
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    if section.recipe != "tensorwise":
        from titan_lite.parallel.torch_compiler import config as inductor

        # Recomputation must round as forward did: otherwise, compiled RMSNorm with rowwise scales
        # gives NaN (github.com/pytorch/pytorch/issues/150859).
        inductor.emulate_precision_casts = True
    chosen, left_out = choose_linears(model, section, plan)
    logger.info("Float8 leaves in high precision: %s", summarize_left_out(left_out))
    config = Float8LinearConfig.from_recipe_name(TORCHAO_NAMES.get(section.recipe, section.recipe))
    convert_to_float8_training(
        model,
        config=dataclasses.replace(
            config,
            enable_fsdp_float8_all_gather=section.fsdp_all_gather,
            emulate=section.emulate,
        ),
        module_filter_fn=lambda _, name: name in chosen,
    )
    if section.fsdp_all_gather:
        for linear in float8_linears(model).values():
            linear.register_state_dict_post_hook(_unwrap_weight)
    return chosen


@torch.no_grad()
def _unwrap_weight(
    _linear: nn.Module, state_dict: dict[str, Any], prefix: str, _metadata: Any
) -> None:
    """Saves the plain tensor inside torchao's, so that reading checkpoints needs no torchao."""
    weight = state_dict[f"{prefix}weight"]
    if isinstance(weight, DTensor) and is_gathered_in_float8(weight):
        plain = weight.to_local()._tensor  # type: ignore[attr-defined]
        state_dict[f"{prefix}weight"] = with_local(weight, plain)


def float8_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Returns the converted linears by name."""
    if "torchao.float8" not in sys.modules:
        return {}
    from torchao.float8.float8_linear import Float8Linear

    return {name: m for name, m in model.named_modules() if isinstance(m, Float8Linear)}


def is_gathered_in_float8(weight: torch.Tensor) -> bool:
    """Returns True if FSDP2 gathers this weight in float8, not in param_dtype."""
    return hasattr(to_local(weight), "fsdp_pre_all_gather")


def refresh_scales(model: nn.Module) -> None:
    """Computes the scales of the weights that are gathered in float8; collective.

    Must be called whenever weights have changed. It uses one all-reduce for all weights; otherwise
    FSDP2 waits for one all-reduce per weight.
    """
    from torchao.float8 import precompute_float8_dynamic_scale_for_fsdp

    precompute_float8_dynamic_scale_for_fsdp(model)


def in_float8_styles(model: Transformer, plan: tuple[PlanRow, ...]) -> set[str]:
    """Returns the modules with torchao's parallel styles, which communicate in float8.

    These are the linears with one scale per tensor, and the modules that gather inputs only for
    such linears: any other linear needs the input in high precision.
    """
    tensorwise = {
        name
        for name, linear in float8_linears(model).items()
        if linear.config.cast_config_input.scaling_granularity.value == "tensorwise"  # type: ignore[union-attr]
    }
    colwise = {name for name, _ in model.named_modules() if _role(name, plan) == "colwise"}
    # Linears that are whole on each rank read the same input, in high precision.
    whole = [name for name, _ in model.named_modules() if _role(name, plan) == "whole"]
    gathers, mixed = set(), []
    for name, _ in model.named_modules():
        if _role(name, plan) == "gather" and not any(w.startswith(f"{name}.") for w in whole):
            fed = {linear for linear in colwise if linear.startswith(f"{name}.")}
            if fed and fed <= tensorwise:
                gathers.add(name)
            elif fed & tensorwise:
                mixed.append(name)
    if mixed:
        logger.warning(
            "%s: tensor parallel gathers its input in high precision, because some of the linears "
            "that read it are left out of float8",
            ", ".join(dict.fromkeys(map(_pattern, mixed))),
        )
    return tensorwise | gathers


def float8_styles() -> tuple[
    type[ColwiseParallel], type[RowwiseParallel], type[PrepareModuleInput]
]:
    """Returns torchao's colwise, rowwise and gathering styles, which cast before they gather."""
    from torchao.float8.float8_tensor_parallel import (
        Float8ColwiseParallel,
        Float8RowwiseParallel,
        PrepareFloat8ModuleInput,
    )

    return Float8ColwiseParallel, Float8RowwiseParallel, PrepareFloat8ModuleInput
