"""Applies parallelism to a model, in one function that shows the order."""

from functools import partial

import torch
import torch.distributed as dist

from titan_lite.config.activation_checkpoint import ActivationCheckpoint
from titan_lite.config.schema import (
    Attention,
    Compile,
    Float8,
    Parallel,
    Training,
)
from titan_lite.models.roles import PlanRow
from titan_lite.nn.transformer import Transformer
from titan_lite.parallel.activation_checkpoint import apply_activation_checkpoint
from titan_lite.parallel.applied import Applied, configured_modules, count_applied
from titan_lite.parallel.async_tp import apply_async_tp
from titan_lite.parallel.attention_kernel import apply_attention_kernel, merged_kernel
from titan_lite.parallel.compile import apply_compile
from titan_lite.parallel.context import apply_cp
from titan_lite.parallel.expert import apply_ep, apply_whole_counts
from titan_lite.parallel.float8 import convert
from titan_lite.parallel.fsdp import apply_fsdp
from titan_lite.parallel.mesh import Meshes
from titan_lite.parallel.tensor import apply_tp


def parallelize(
    model: Transformer,
    meshes: Meshes,
    tp_plan: tuple[PlanRow, ...],
    *,
    parallel: Parallel,
    training: Training,
    activation_checkpoint: ActivationCheckpoint,
    attention: Attention,
    compile: Compile,
    float8: Float8,
) -> Applied:
    """Parallelizes a model built on the meta device, in place, and counts what was applied.

    The order: float8 first, because tensor parallel communicates in float8 for its linears. Context
    parallel after tensor parallel, because it works on this rank's heads. Activation checkpointing
    before compile, so that the compiler sees the recomputation. Compile before FSDP2, whose hooks
    and all-gathers stay outside of the compiled graphs.
    """
    sequence: list[dist.ProcessGroup] = []
    apply_attention_kernel(attention.kernel)
    float8_linears = convert(model, float8, tp_plan)
    if parallel.tp > 1:
        apply_tp(model, meshes.tp, tp_plan, sequence_parallel=parallel.sequence_parallel)
        sequence.append(meshes.tp.get_group())
    if meshes.cp is not None:
        sequence.append(meshes.cp)
        kernel = partial(
            merged_kernel,
            attention.kernel,
            meshes.fsdp.device_type,
            deterministic=training.deterministic,
        )
        apply_cp(model, meshes.cp, parallel.cp_method, kernel)
    if sequence:
        apply_whole_counts(model, sequence)
    if meshes.ep is not None:
        apply_ep(model, meshes.ep)
    apply_activation_checkpoint(model, activation_checkpoint)
    if compile.enable:
        apply_async_tp(meshes.tp, enable=parallel.async_tp)
    apply_compile(model, compile)
    apply_fsdp(
        model,
        meshes.fsdp,
        parallel,
        param_dtype=getattr(torch, training.param_dtype),
        reduce_dtype=getattr(torch, training.reduce_dtype),
        expert_mesh=meshes.efsdp,
        compiles_blocks=compile.covers("model"),
    )
    applied = count_applied(model, tp_plan, meshes.model)
    configured = configured_modules(
        model,
        tp_plan,
        parallel=parallel,
        activation_checkpoint=activation_checkpoint,
        compile=compile,
        float8=float8_linears,
        float8_all_gather=float8.fsdp_all_gather,
    )
    precision = f"{training.param_dtype} computation, {training.reduce_dtype} reduction"
    applied.check(configured, activation_checkpoint, parallel, precision, attention.kernel)
    return applied
