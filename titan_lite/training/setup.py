"""Builds the model with initial weights, the optimizer and the TrainStep.

For real runs, and for dry runs on fake tensors.
"""

import contextlib
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from titan_lite.data.loader import Batch
from titan_lite.models.args import MoEArgs
from titan_lite.models.plan import Plan
from titan_lite.nn.transformer import Transformer
from titan_lite.optim.ema import WeightAverage
from titan_lite.optim.loss_scaler import LossScaler
from titan_lite.optim.nonfinite import NonFiniteGuard
from titan_lite.optim.optimizer import OptimizerContext, build_optimizer
from titan_lite.parallel.applied import Applied
from titan_lite.parallel.init_weights import init_weights
from titan_lite.parallel.mesh import build_meshes
from titan_lite.parallel.parallel_model import build_parallel
from titan_lite.parallel.pipeline import Stage
from titan_lite.planner.counts import FlopsPerToken, in_words
from titan_lite.runtime.distributed import Process, set_timeout
from titan_lite.runtime.progress import Progress
from titan_lite.training.balancing import Balancer
from titan_lite.training.inputs import ModelInputs, labelled_indices
from titan_lite.training.meta_model import WholeModel, count_flops
from titan_lite.training.objective import OBJECTIVES, Objective
from titan_lite.training.step import TrainStep

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class BuiltTraining:
    """This rank's part of a model, with its training step.

    num_params, parameter_names (in the model's order), stages and flops are of the whole model.
    """

    num_params: int
    parameter_names: list[str]
    stages: list[Stage]
    flops: FlopsPerToken
    objective: Objective
    model: Transformer
    applied: Applied
    train_step: TrainStep


def build_training(
    plan: Plan,
    process: Process,
    whole: WholeModel,
    *,
    progress: Progress | None = None,
    fake_mode: AbstractContextManager[object] | None = None,
    find_labelled: Callable[[Batch], Tensor] = labelled_indices,
) -> BuiltTraining:
    """Cuts the model to this rank's part, initializes it, and builds its optimizer and TrainStep.

    Collective. whole: its model is changed in place. progress: the run's current phase.
    fake_mode, find_labelled: set by dry runs only. Weights (without values) and the optimizer are
    created inside fake_mode; find_labelled replaces `labelled_indices`.
    """
    config, training, model = plan.config, plan.config.training, whole.model
    meshes = build_meshes(
        plan.dims, process.device.type, has_experts=isinstance(plan.args, MoEArgs)
    )
    if fake_mode is None:
        # The meshes' process groups do not inherit the timeout of the default group.
        set_timeout(config.comm.init_timeout_seconds)
    logger.info("Building the model: %s parameters", in_words(model.num_parameters, plan.args))
    # Counted on the whole model, before build_parallel cuts it to this rank's part.
    flops = count_flops(plan, whole)
    num_params = model.num_parameters
    parameter_names = [name for name, _ in model.named_parameters()]
    objective = OBJECTIVES[plan.family.objective](config)
    parallel_model = build_parallel(model, whole.stages, plan, meshes, process)
    with fake_mode or contextlib.nullcontext():
        init_weights(
            model,
            device=process.device,
            seed=training.seed if fake_mode is None else None,
            cpu_offload=config.parallel.cpu_offload,
        )
        context = OptimizerContext(
            ranks=meshes.stage,
            param_dtype=getattr(torch, training.param_dtype),
            args=plan.args,
        )
        optimizer = build_optimizer(model, config.optimizer, plan.family.tp_plan, context)
        # The CPU with parallel.cpu_offload, else process.device.
        parameter_device = next(model.parameters()).device
        guard = (
            LossScaler(parameter_device)
            if training.param_dtype == "float16"
            else NonFiniteGuard(training.nonfinite, parameter_device)
        )
        average = WeightAverage(config.ema, model) if config.ema.enable else None
        balancer = None
        if isinstance(plan.args, MoEArgs):
            num_tokens = plan.global_batch_size * training.seq_len
            balancer = Balancer(model, plan.args, meshes, num_tokens, process.device)
        applied, indices = parallel_model.applied, parallel_model.local_indices
        train_step = TrainStep(
            inputs=ModelInputs(
                config, plan.args, objective, process.device, indices, find_labelled
            ),
            model=model,
            pipeline=parallel_model.pipeline,
            meshes=meshes,
            parallel=config.parallel,
            optimizer=optimizer,
            guard=guard,
            max_norm=training.max_norm,
            progress=progress or Progress(),
            average=average,
            balancer=balancer,
            has_float8_all_gather=applied.count("float8 all-gather") > 0,
        )
        train_step.refresh_float8_scales()
    return BuiltTraining(
        num_params=num_params,
        parameter_names=parameter_names,
        stages=whole.stages,
        flops=flops,
        objective=objective,
        model=model,
        applied=applied,
        train_step=train_step,
    )
