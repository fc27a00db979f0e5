"""Builds this rank's parallelized part of a model on the meta device, with its pipeline."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from titan_lite.models.plan import Plan
from titan_lite.nn.build_model import build_model
from titan_lite.nn.transformer import Transformer
from titan_lite.parallel.applied import Applied, merge_applied
from titan_lite.parallel.context import local_positions
from titan_lite.parallel.mesh import Meshes
from titan_lite.parallel.parallelize import parallelize
from titan_lite.parallel.pipeline import (
    Pipeline,
    Stage,
    local_stages,
    merge_stages,
    prune_to_stage,
    summarize_stages,
)
from titan_lite.runtime.distributed import Process


@dataclass(frozen=True)
class ParallelModel:
    """This rank's part of a model; parameters have the names of the whole model.

    pipeline: runs the stages; None if `model` itself is called. local_indices: indices of this
    rank's tokens in each sequence.
    """

    model: Transformer
    pipeline: Pipeline | None
    applied: Applied
    meshes: Meshes
    local_indices: Tensor


def build_parallel(
    model: Transformer,
    stages: Sequence[Stage],
    plan: Plan,
    meshes: Meshes,
    process: Process,
) -> ParallelModel:
    """Parallelizes the whole `model`, or, with pipeline parallel, this rank's `stages` of it."""
    config = plan.config
    parallel, training = config.parallel, config.training
    place = plan.dims.coordinates(process.rank)
    local = {0: model}
    indices = local_positions(parallel.cp_method, training.seq_len, place["cp"], parallel.cp)
    if meshes.pp is not None:
        with torch.device("meta"):
            local = {
                number: prune_to_stage(build_model(plan.family, plan.args), stages[number].modules)
                for number in local_stages(parallel, place["pp"])
            }
    applied = merge_applied(
        [
            parallelize(
                stage,
                meshes,
                plan.family.tp_plan,
                parallel=parallel,
                training=training,
                activation_checkpoint=config.activation_checkpoint,
                attention=config.attention,
                compile=config.compile,
                float8=config.float8,
            )
            for stage in local.values()
        ]
    )
    if meshes.pp is None:
        return ParallelModel(model, None, applied, meshes, indices)
    applied = dataclasses.replace(applied, pipeline=summarize_stages(stages, parallel.pp_schedule))
    tokens = training.seq_len // parallel.cp
    split_over = parallel.tp if parallel.sequence_parallel else 1
    dtype = "float32" if plan.args.fp32_residual else training.param_dtype
    pipeline = Pipeline(
        local,
        parallel,
        num_micro_batches=parallel.micro_batches_per_pass(plan.micro_steps),
        tokens_shape=(training.local_batch_size, tokens),
        hidden_shape=(training.local_batch_size, tokens // split_over, plan.args.dim),
        hidden_dtype=getattr(torch, dtype),
        device=process.device,
        group=meshes.pp,
    )
    merge_stages(model, list(local.values()))
    return ParallelModel(model, pipeline, applied, meshes, indices)
