"""Runs one rank of a run on fake tensors, without the other ranks."""

import contextlib
import dataclasses
import math
import multiprocessing
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from titan_lite.config.arguments import UsageError
from titan_lite.config.dims import SAME_LAYERS
from titan_lite.config.optimizers import AdamOptimizer
from titan_lite.config.plugins import import_plugins
from titan_lite.config.schema import Config, Data, Training
from titan_lite.data.loader import Batch
from titan_lite.dryrun.gpu_kernels import gpu_kernels
from titan_lite.dryrun.measure import Measured, measure_step, recorder
from titan_lite.dryrun.rank_progress import RankProgress
from titan_lite.dryrun.repeat import NotRepeatable, repeat_blocks
from titan_lite.dryrun.torch_private import DryMode, fake_world
from titan_lite.models.plan import Plan
from titan_lite.optim.low_precision_adam import prepare_int8
from titan_lite.optim.optimizer import with_state
from titan_lite.parallel.expert import assume_balance
from titan_lite.parallel.pipeline import local_stages
from titan_lite.runtime.distributed import Process
from titan_lite.runtime.parent import MAYBE_OUT_OF_MEMORY, end_with_parent, making_locks
from titan_lite.training.meta_model import build_whole_model, check_float8
from titan_lite.training.setup import BuiltTraining, build_training


class NotRepeatableError(Exception):
    """Some of the equal blocks cannot stand for all of them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DryRank:
    """One rank of a run and its measured step.

    formula_flops: its share of the planner's FLOPs. place: its coordinate on each mesh axis.
    stages: numbers of its pipeline stages.
    """

    rank: int
    place: dict[str, int]
    stages: tuple[int, ...]
    parameters: int
    applied: str
    formula_flops: int
    measured: Measured


def dry_run(
    plan: Plan,
    rank: int,
    *,
    on_gpu: bool = True,
    repeats: bool = True,
    progress: RankProgress | None = None,
) -> DryRank:
    """Builds one rank of the run and measures one step; only once per process.

    A second call would find process groups of the first in torch's caches, which use their names.
    on_gpu: use GPU kernels if they store other tensors than the CPU's. repeats: run only some of
    equal blocks; raises NotRepeatableError if that is not possible.
    """
    is_compiled = plan.config.compile.covers("model")
    plan = dataclasses.replace(plan, config=_eager(plan.config))
    optimizer = plan.config.optimizer
    if isinstance(optimizer, AdamOptimizer) and optimizer.state_dtype == "int8":
        prepare_int8()
    kernels = gpu_kernels() if on_gpu else contextlib.nullcontext()
    recording = recorder(plan.dims, fuses_float8_casts=is_compiled)
    fake = DryMode(allow_non_fake_inputs=True)
    # Autograd rejects fake CUDA tensors on a machine without a GPU.
    process = Process(rank, 0, plan.dims.world_size, torch.device("cpu"))
    with plan.reporting(), fake_world(rank, plan.dims.world_size), recording as record:
        whole = build_whole_model(plan)
        # Checks only what is independent of the device: this machine's is not the run's.
        section = plan.config.float8.model_copy(update={"emulate": True})
        check_float8(plan, whole.model, section, torch.device("meta"))
        labelled = partial(_labelled, plan.head_token_fraction)
        built = build_training(plan, process, whole, fake_mode=fake, find_labelled=labelled)
        if not built.train_step.optimizer.state:
            # Optimizers of plugins create their state in the first step: a later one is measured.
            with fake:
                with_state(built.train_step.optimizer)
        assume_balance(built.model)
        if built.train_step.pipeline is not None:
            built.train_step.pipeline.skip_shape_negotiation()
        if progress is not None:
            progress.enter("optimizer state")
            progress.watch(
                built.model.layers.values(), plan.micro_steps, built.train_step.optimizer
            )
        # Not with schedules that split backward, which search each block's graph for parameters,
        # nor with dropout, whose keys for each block are freed between blocks.
        splits_backward = plan.config.parallel.schedule.splits_backward
        if repeats and not splits_backward and not plan.args.has_dropout:
            repeat_blocks(record, _blocks(built))
        batches = _batches(
            plan.config.training, plan.config.data, with_pairs=built.objective.has_pairs
        )

        def take_step() -> None:
            built.train_step([next(batches) for _ in range(plan.micro_steps)], lr=0.0)

        try:
            with fake, kernels:
                measured = measure_step(built, take_step, record)
        except NotRepeatable as error:
            # A multiprocessing.Pool would wait forever for a worker that raises a BaseException.
            raise NotRepeatableError(str(error)) from None
    dims, parallel = plan.dims, plan.config.parallel
    place = dims.coordinates(rank)
    stages = local_stages(parallel, place["pp"]) if dims.pp > 1 else [0]
    # A rank computes its part of the sequence and of the matrices.
    tokens = plan.global_batch_size * plan.config.training.seq_len
    flops = tokens * sum(built.stages[number].flops for number in stages)
    return DryRank(
        rank=rank,
        place=place,
        stages=tuple(stages),
        parameters=built.num_params,
        applied=str(built.applied),
        formula_flops=flops // dims.over(SAME_LAYERS),
        measured=measured,
    )


def _blocks(built: BuiltTraining) -> list[list[nn.Module]]:
    """Returns the blocks of each pipeline stage of this rank."""
    if built.train_step.pipeline is None:
        return [list(built.model.layers.values())]
    models: list[Any] = [stage.submod for stage in built.train_step.pipeline.stages]
    return [list(model.layers.values()) for model in models]


def dry_runs(plan: Plan, ranks: Sequence[int]) -> list[DryRank]:
    """Runs `dry_run` for several ranks, each in a process; ConfigError if one is killed."""
    context = multiprocessing.get_context("spawn")

    def run(number: int, rank: int) -> DryRank:
        place = rank, number, len(ranks)

        def in_a_process(*, repeats: bool) -> DryRank:
            with making_locks():
                pool = ProcessPoolExecutor(1, context, initializer=end_with_parent)
            with pool as process:
                return process.submit(_quiet_dry_run, plan, place, repeats=repeats).result()

        try:
            try:
                return in_a_process(repeats=True)
            except NotRepeatableError:
                return in_a_process(repeats=False)
        except BrokenProcessPool:
            raise UsageError(
                f"the process of rank {rank} was killed {MAYBE_OUT_OF_MEMORY}: to need less "
                "memory, run one rank at a time with --rank"
            ) from None

    with ThreadPoolExecutor(min(len(ranks), os.cpu_count() or 1)) as threads:
        return list(threads.map(run, range(1, len(ranks) + 1), ranks))


def left_out(config: Config) -> list[str]:
    """Returns the differences between the step and its dry run, in sentences."""
    notes = []
    if config.compile.enable:
        notes.append(
            "compile.enable: the step runs eagerly, except casts to float8; a compiled step stores "
            "and computes less between matmuls"
        )
    if config.parallel.async_tp:
        notes.append(
            "parallel.async_tp: whole collectives are counted; the compiler splits them into chunks"
        )
    if config.activation_checkpoint.mode == "memory_budget":
        notes.append(
            'activation_checkpoint.mode = "memory_budget": activations are counted without '
            "recomputation, which only the compiler plans"
        )
    if config.data.masks_attention:
        exchange = ""
        if config.parallel.cp > 1 and config.parallel.cp_method == "all_gather":
            exchange = "; the gathered keys and values, kept for backward, are not counted"
        notes.append(
            f'data.packing "{config.data.packing}": attention is counted over whole samples'
            f"{exchange}"
        )
    if config.validation.enable:
        notes.append("validation.enable: validation, which has no backward, is not counted")
    if config.parallel.cpu_offload:
        notes.append(
            "parallel.cpu_offload: parameters, gradients and optimizer state are counted although "
            "they are in host memory"
        )
    return notes


def _eager(config: Config) -> Config:
    off = {
        "compile": config.compile.model_copy(update={"enable": False}),
        "parallel": config.parallel.model_copy(update={"async_tp": False, "fsdp_symm_mem": False}),
    }
    if config.attention.kernel != "math":
        # All fused kernels store the same tensors as the CPU's.
        off["attention"] = config.attention.model_copy(update={"kernel": "auto"})
    return config.model_copy(update=off)


def _quiet_dry_run(plan: Plan, place: tuple[int, int, int], *, repeats: bool) -> DryRank:
    # torch's warnings are about the fake process group, or appear in a real run as well.
    warnings.simplefilter("ignore")
    import_plugins(plan.config.job.plugins)
    with contextlib.closing(RankProgress(*place)) as progress:
        return dry_run(plan, place[0], repeats=repeats, progress=progress)


def _labelled(fraction: float, batch: Batch) -> Tensor:
    """Returns positions with a label; only their number matters, because labels are fake."""
    return batch.labels.new_zeros(math.ceil(fraction * batch.labels.numel()))


def _batches(training: Training, data: Data, *, with_pairs: bool) -> Iterator[Batch]:
    # Made within a step, so they are fake tensors. Document ends are unknown, so there are none:
    # attention within documents stores the same tensors as attention over whole samples.
    shape = training.local_batch_size, training.seq_len
    while True:
        tokens = torch.zeros(shape, dtype=torch.int64)
        positions = torch.zeros_like(tokens) if data.masks_attention else None
        yield Batch(
            inputs=tokens,
            labels=torch.zeros_like(tokens),
            positions=positions,
            token_types=tokens if with_pairs else None,
            pair_labels=tokens[:, 0] if with_pairs else None,
            num_tokens=torch.full_like(tokens[:, 0], training.seq_len) if with_pairs else None,
            sources=tokens.new_zeros(len(tokens)) if data.sources else None,
            samples=tokens[:, 0],
        )
