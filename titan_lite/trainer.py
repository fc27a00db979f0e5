"""The table of contents of a run: builds everything in order, then trains."""

import dataclasses
import itertools
import logging
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from titan_lite.checkpoint.manager import CheckpointManager, agree_on_step
from titan_lite.config.load import ConfigError, LoadedConfig, Problem
from titan_lite.data.loader import Batch, DataLoader, merge_states
from titan_lite.loss import IGNORE_INDEX, cross_entropy_sum
from titan_lite.metrics.device import Peak, device_name, find_peak
from titan_lite.metrics.meter import Meter
from titan_lite.metrics.record import Record
from titan_lite.metrics.sinks import open_sinks
from titan_lite.models.args import DecoderArgs
from titan_lite.models.rules import Plan
from titan_lite.nn.build import build
from titan_lite.nn.decoder import Decoder
from titan_lite.optim.loss_scaler import LossScaler
from titan_lite.optim.optimizer import build_optimizer, set_lr
from titan_lite.optim.schedule import lr_factor
from titan_lite.parallel.async_tp import check_async_tp, count_fused
from titan_lite.parallel.compile import Compilations
from titan_lite.parallel.context import check_cp, local_positions
from titan_lite.parallel.float8 import float8_problems, refresh_scales
from titan_lite.parallel.fsdp import set_gradient_sync
from titan_lite.parallel.gradients import clip_grad_norm
from titan_lite.parallel.init_weights import init_weights
from titan_lite.parallel.mesh import build_meshes
from titan_lite.parallel.parallelize import parallelize
from titan_lite.parallel.pipeline import (
    Pipeline,
    Stage,
    add_tied_gradients,
    describe,
    join,
    keep,
    local_stages,
    split,
)
from titan_lite.parallel.report import together
from titan_lite.planner.counts import FORMULA, FlopsPerToken, flops_per_token
from titan_lite.preflight import blaming, checkpoint_folder, preflight
from titan_lite.runtime.distributed import Process, check_dtype, set_timeout, start_process_group
from titan_lite.runtime.garbage import collected_every
from titan_lite.runtime.profiler import check_profiling, profiling
from titan_lite.runtime.run_folder import open_run_folder, update_run_file, write_run_file
from titan_lite.runtime.seed import set_determinism

logger = logging.getLogger(__name__)


class Trainer:
    """One run. Building it is collective; `train` then does the steps that are left.

    What a run takes from outside (files, data, the device, sinks) enters through methods of its
    own, for the dry run to put others in their place.
    """

    def __init__(self, loaded: LoadedConfig, plan: Plan, process: Process | None = None) -> None:
        self.config = config = loaded.config
        self.dims = plan.dims
        self.vocab_size = plan.args.vocab_size
        self.process = process or Process.from_environment()
        self.run_folder = Path(config.job.dump_folder)
        training = config.training
        # What can be refused is refused before any process waits for another.
        self._find_files(loaded, plan)
        with torch.device("meta"):
            args = dataclasses.replace(plan.args, vocab_multiple=self.dims.tp)
            self.model = build(plan.family, args)
        self.stages = self._split(loaded, plan.args)
        padding = (args.padded_vocab_size - args.vocab_size) * args.dim
        padding *= 1 if args.tied_head else 2
        self.num_params = sum(p.numel() for p in self.model.parameters()) - padding
        self.flops = self._count_flops(plan.args)
        self._check_device(loaded, plan)
        self.global_batch_size = training.global_batch_size
        if self.global_batch_size == -1:
            self.global_batch_size = training.local_batch_size * self.dims.batch
        self.micro_steps = self.global_batch_size // (training.local_batch_size * self.dims.batch)
        self.num_micro_batches = self.micro_steps
        if config.parallel.pp_micro_batches != -1:
            self.num_micro_batches = config.parallel.pp_micro_batches
        self._open_data(loaded)

        start_process_group(self.process, config.comm)
        set_determinism(training.seed, deterministic=training.deterministic)
        self._agree_on_step(loaded)
        meshes = build_meshes(self.dims, self.process.device.type)
        # The meshes' groups do not inherit the timeout of the first one.
        set_timeout(config.comm.init_timeout_seconds)
        self.loss_group, self.pp_group = meshes.loss, meshes.pp
        self.positions = self._local_positions()

        local = self._local_stages(plan, args)
        self.applied = together(
            [
                parallelize(
                    stage,
                    meshes,
                    plan.family.tp_plan,
                    parallel=config.parallel,
                    training=training,
                    activation_checkpoint=config.activation_checkpoint,
                    compile=config.compile,
                    float8=config.float8,
                )
                for stage in local.values()
            ]
        )
        if len(self.stages) > 1:
            words = describe(self.stages, config.parallel.pp_schedule)
            self.applied = dataclasses.replace(self.applied, pipeline=words)
        self.pipeline = None
        if meshes.pp is not None:
            self.pipeline = self._build_pipeline(local, args, meshes.pp)
            join(self.model, list(local.values()))
        self.compilations = Compilations() if config.compile.enable else None
        self._build_state()
        self._resume(loaded)
        self.meter = self._build_meter()

    def _find_files(self, loaded: LoadedConfig, plan: Plan) -> None:
        """The tokenizer, and the state to continue from."""
        found = preflight(loaded, plan)
        self.tokenizer, self.state = found.tokenizer, found.state

    def _agree_on_step(self, loaded: LoadedConfig) -> None:
        with blaming("checkpoint.load_step", loaded):
            agree_on_step(self.state.step, checkpoint_folder(loaded))

    def _build_state(self) -> None:
        """Weights, optimizer and loss scaler, as they are at step 0."""
        config = self.config
        init_weights(
            self.model,
            device=self.process.device,
            seed=config.training.seed,
            cpu_offload=config.parallel.cpu_offload,
        )
        self.optimizer = build_optimizer(self.model, config.optimizer)
        self.loss_scaler = None
        if config.training.param_dtype == "float16":
            self.loss_scaler = LossScaler(next(self.model.parameters()).device)

    def _resume(self, loaded: LoadedConfig) -> None:
        """Loads the checkpoint to continue from, if there is one, and opens the run's folder."""
        resume_step = self.state.step
        self.checkpoints = CheckpointManager(
            self.config.checkpoint,
            checkpoint_folder(loaded),
            model=self.model,
            optimizer=self.optimizer,
            device=self.process.device,
        )
        if resume_step > 0:
            self.checkpoints.load(resume_step)
            if self.loss_scaler is not None and self.state.loss_scaler:
                self.loss_scaler.load_state_dict(self.state.loss_scaler)
            logger.info("Resumed from step %d of %s", resume_step, checkpoint_folder(loaded))
        if self.applied.count("float8 all-gather"):
            refresh_scales(self.model)
        if self.process.rank == 0:
            with blaming("job.dump_folder", loaded):
                open_run_folder(self.run_folder, resume_step=resume_step)
            self.checkpoints.leave_later_branch(resume_step)

    def _split(self, loaded: LoadedConfig, args: DecoderArgs) -> list[Stage]:
        """The pipeline stages of the whole model."""
        parallel, seq_len = self.config.parallel, self.config.training.seq_len
        key = "pp_stage_modules" if parallel.pp_split == "explicit" else "pp"
        with blaming(f"parallel.{key}", loaded):
            stages = split(
                self.model,
                parallel,
                attention_flops=12 * args.num_heads * args.head_dim * seq_len,
            )
        section = self.config.activation_checkpoint
        if section.mode == "fraction" and not any(section.layers(s.blocks) for s in stages):
            with blaming("activation_checkpoint.fraction", loaded):
                raise ValueError(
                    f"fraction ({section.fraction:g}) of the blocks of each pipeline stage "
                    f"({', '.join(str(stage.blocks) for stage in stages)}) is no layer"
                )
        return stages

    def _count_flops(self, args: DecoderArgs) -> FlopsPerToken:
        """Of the whole model, before any part of it is dropped."""
        section = self.config.activation_checkpoint
        # A tied one multiplies, as the head.
        looked_up = 0 if args.tied_head else args.vocab_size * args.dim
        recomputed = [section.layers(stage.blocks) for stage in self.stages]
        return flops_per_token(
            num_params_non_embedding=self.num_params - looked_up,
            num_block_params=sum(p.numel() for p in self.model.layers.parameters()),
            num_last_matmul_params=args.num_layers * args.dim * args.ffn_dim,
            num_layers=args.num_layers,
            attention_dim=args.num_heads * args.head_dim,
            seq_len=self.config.training.seq_len,
            num_recomputed_layers=(
                0 if section.mode == "selective_op" else sum(map(len, recomputed))
            ),
        )

    def _local_stages(self, plan: Plan, args: DecoderArgs) -> dict[int, Decoder]:
        """This rank's pipeline stages by their number, on the meta device."""
        parallel = self.config.parallel
        if parallel.pp == 1:
            return {0: self.model}
        place = self.dims.coordinates(self.process.rank)
        with torch.device("meta"):
            return {
                number: keep(build(plan.family, args), self.stages[number].modules)
                for number in local_stages(parallel, place["pp"])
            }

    def _build_pipeline(
        self, local: dict[int, Decoder], args: DecoderArgs, group: dist.ProcessGroup
    ) -> Pipeline:
        parallel, training = self.config.parallel, self.config.training
        tokens = training.seq_len // parallel.cp
        split_over = parallel.tp if parallel.sequence_parallel else 1
        dtype = "float32" if args.fp32_residual else training.param_dtype
        return Pipeline(
            local,
            parallel,
            num_micro_batches=self.num_micro_batches,
            tokens_shape=(training.local_batch_size, tokens),
            hidden_shape=(training.local_batch_size, tokens // split_over, args.dim),
            hidden_dtype=getattr(torch, dtype),
            device=self.process.device,
            group=group,
        )

    def _check_device(self, loaded: LoadedConfig, plan: Plan) -> None:
        """ConfigError for what this device, or float8 with this model, cannot do."""
        config, device = loaded.config, self.process.device
        with blaming("profiling.enable_memory_snapshot", loaded):
            check_profiling(config.profiling, device)
        with blaming("training.param_dtype", loaded):
            check_dtype(config.training.param_dtype, device)
        if config.parallel.async_tp:
            with blaming("parallel.async_tp", loaded):
                check_async_tp(device, self.dims.tp)
        if self.dims.cp > 1:
            with blaming("training.param_dtype", loaded):
                check_cp(config.parallel.cp_method, device, config.training.param_dtype)
        broken = [
            Problem(key, loaded.origins[key], message)
            for key, message in float8_problems(
                self.model,
                plan.family.tp_plan,
                float8=config.float8,
                parallel=config.parallel,
                dims=self.dims,
                device=device,
            )
        ]
        if broken:
            raise ConfigError(broken)

    def _open_data(self, loaded: LoadedConfig) -> None:
        """Opens the data where the run's state says, and reads the first batch."""
        self.loader = self.build_loader()
        if self.state.step > 0:
            with blaming("checkpoint.load_step", loaded):
                self.loader.load_state_dict(self.state.data)
        # Documents that cannot be read are a mistake to answer now, not in the first step.
        with blaming("data.dataset", loaded):
            batches = iter(self.loader)
            self.batches: Iterator[Batch] = itertools.chain([next(batches)], batches)

    def _local_positions(self) -> Tensor | None:
        """Of this rank's tokens in each sequence; None where it holds whole sequences."""
        if self.dims.cp == 1:
            return None
        return local_positions(
            self.config.parallel.cp_method,
            self.config.training.seq_len,
            rank=self.dims.coordinates(self.process.rank)["cp"],
            size=self.dims.cp,
        )

    def build_loader(self) -> DataLoader:
        """A loader of this rank's share of the run's samples, from the first one on."""
        training = self.config.training
        return DataLoader(
            self.config.data,
            seq_len=training.seq_len,
            seed=training.seed,
            local_batch_size=training.local_batch_size,
            global_batch_size=self.global_batch_size,
            batch_rank=self.dims.batch_rank(self.process.rank),
            batch_degree=self.dims.batch,
            tokenizer=self.tokenizer,
        )

    def train(self) -> None:
        """Trains up to `training.steps`, logging, saving and profiling on the way; collective."""
        first, last = self.state.step + 1, self.config.training.steps
        if first > last:
            logger.info("Step %d of %d is done already: nothing is left to train", first - 1, last)
            return
        comm, profile_folder = self.config.comm, self.run_folder / "profile"
        with (
            collected_every(self.config.training.gc_freq) as collect,
            profiling(self.config.profiling, profile_folder, self.process.rank) as profile,
        ):
            for step in range(first, last + 1):
                self.train_step(step)
                if step == first:
                    set_timeout(comm.train_timeout_seconds)
                    self.report_compiled()
                if self.checkpoints.should_save(step, last):
                    # The slowest disk of all is waited for: longer than a step may take.
                    set_timeout(comm.init_timeout_seconds)
                    with self.meter.excluded():
                        self.save()
                    set_timeout(comm.train_timeout_seconds)
                collect(step)
                profile(step)
        logger.info("Everything is in %s\n%s", self.run_folder, self.meter.summary())

    def close(self) -> None:
        """Stops the loader's worker and closes the metric files."""
        self.loader.close()
        self.meter.close()

    def train_step(self, step: int) -> Record | None:
        """One optimizer step over the global batch; collective. Returns its record if logged."""
        training, device = self.config.training, self.process.device
        with self.meter.waiting_for_data():
            micro_batches = [self._local(next(self.batches)) for _ in range(self.micro_steps)]

        # Every token of the global batch weighs the same, wherever it is: the sum over
        # micro-batches and ranks is divided by the valid tokens of all of them.
        valid = sum(self._count_valid(labels) for _, labels in micro_batches)
        num_valid = torch.full((), float(valid), device=device)
        dist.all_reduce(num_valid, group=self.loss_group)
        num_valid.clamp_(min=1)
        factor = num_valid.reciprocal()
        if self.loss_scaler is not None:
            factor *= self.loss_scaler.scale.to(device)
        loss = self._forward_backward(micro_batches, factor)

        loss_scale = None
        if self.loss_scaler is not None:
            loss_scale = self.loss_scaler.scale
            loss /= loss_scale.to(device)
        copy = None
        if self.pp_group is not None and self.model.tied_head:
            add_tied_gradients(self.model, self.pp_group)
            if self.model.output is not None:
                copy = self.model.get_parameter("output.weight")
        grad_norm = clip_grad_norm(
            self.model.parameters(),
            training.max_norm,
            loss_scale=loss_scale,
            pp_group=self.pp_group,
            copy=copy,
        )
        lr = self.config.optimizer.lr * lr_factor(step, self.config.lr_scheduler, training.steps)
        set_lr(self.optimizer, lr)
        if self.loss_scaler is None:
            self.optimizer.step()
        else:
            self.loss_scaler.step(self.optimizer, is_finite=grad_norm.isfinite())
        if self.applied.count("float8 all-gather"):
            refresh_scales(self.model)
        self.optimizer.zero_grad()

        if self.compilations is not None:
            for reason in self.compilations.after_step():
                logger.warning(
                    "Step %d compiled anew (%d times so far since the warm-up): %s",
                    step,
                    self.compilations.recompilations,
                    reason,
                )

        tokens = self.global_batch_size * training.seq_len
        self.state.step = step
        self.state.tokens += tokens
        self.meter.add(tokens=tokens, samples=self.global_batch_size)
        if not self.meter.should_log(step):
            return None
        dist.all_reduce(loss, group=self.loss_group)
        if self.pp_group is not None:
            # Only ranks that have the last stage know a part of it.
            dist.all_reduce(loss, group=self.pp_group)
        record = self.meter.log(
            step,
            loss=loss,
            grad_norm=grad_norm,
            lr=self.optimizer.param_groups[0]["lr"],
            tokens_seen=self.state.tokens,
            extra=None if self.loss_scaler is None else self.loss_scaler.metrics(),
        )
        if self.loss_scaler is not None:
            self.loss_scaler.check(step, record["grad_norm"])
        return record

    def _count_valid(self, labels: Tensor) -> int:
        return int((labels != IGNORE_INDEX).sum())

    def _forward_backward(
        self, micro_batches: Sequence[tuple[Tensor, Tensor]], factor: Tensor
    ) -> Tensor:
        """Adds up the gradients of all micro-batches; returns this rank's part of the loss."""
        config, device = self.config, self.process.device
        positions = None if self.positions is None else self.positions.to(device)
        calls = []
        for micro_batch in micro_batches:
            inputs, labels = (_to_device(tensor, device) for tensor in micro_batch)
            head_loss = partial(
                cross_entropy_sum,
                labels=labels,
                num_chunks=config.training.loss_chunks,
                vocab_size=self.vocab_size,
                factor=factor,
                loss_parallel=config.parallel.loss_parallel,
                compile=config.compile.covers("loss"),
            )
            calls.append((inputs, {"head_loss": head_loss, "positions_S": positions}))
        loss = torch.zeros((), device=device)
        if self.pipeline is not None:
            for first in range(0, len(calls), self.num_micro_batches):
                for share in self.pipeline.step(calls[first : first + self.num_micro_batches]):
                    loss += share
            return loss
        for number, (inputs, kwargs) in enumerate(calls, start=1):
            set_gradient_sync(self.model, config.parallel, last=number == len(calls))
            share = self.model(inputs, **kwargs)
            share.backward()
            loss += share.detach()
        return loss

    def _local(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Inputs and labels of this rank's part of each sequence."""
        if self.positions is None:
            return batch.inputs, batch.labels
        return batch.inputs[:, self.positions], batch.labels[:, self.positions]

    def report_compiled(self) -> None:
        """Adds to the report what only the first step could tell."""
        if self.compilations is None:
            return
        found: dict[str, Any] = {"compiled_graphs": self.compilations.graphs}
        if self.config.parallel.async_tp:
            found |= count_fused()
        self.applied = dataclasses.replace(self.applied, **found)
        logger.info("The first step compiled %s", self.applied.compiled())
        if self.config.parallel.async_tp:
            self.applied.check_async_tp()
        if self.process.rank == 0:
            update_run_file(self.run_folder, {"applied": dataclasses.asdict(self.applied)})

    def save(self) -> None:
        """Saves a checkpoint of the step just done; collective."""
        states: list[dict[str, Any]] = [{}] * self.process.world_size
        dist.all_gather_object(states, self.loader.state_dict())
        self.state.data = merge_states(states)
        self.state.loss_scaler = {} if self.loss_scaler is None else self.loss_scaler.state_dict()
        self.state.config = self.config.model_dump()
        folder = self.checkpoints.save(self.state)
        logger.info("Checkpoint written to %s", folder)

    def _build_meter(self) -> Meter:
        config, device = self.config, self.process.device
        if config.activation_checkpoint.mode in ("selective_op", "memory_budget"):
            logger.info("HFU is not measured: only torch knows what it recomputes in this mode")
        # Emulated float8 is rounded to 8 bits and multiplied in float32.
        dtype = "float32" if config.float8.emulate else config.training.param_dtype
        peak = find_peak(config.metrics, device, getattr(torch, dtype))
        sinks = []
        if self.process.rank == 0:
            sinks = open_sinks(
                config.metrics,
                self.run_folder,
                num_steps=config.training.steps,
                start_step=self.state.step,
            )
            self._write_run_file(peak)
        logger.info(
            "%s%s %s: %s parameters on %d x %s. Applied:\n%s",
            f"{config.job.description}. " if config.job.description else "",
            config.model.name,
            config.model.flavor,
            f"{self.num_params:,}",
            self.dims.world_size,
            device_name(device),
            self.applied,
        )
        return Meter(
            section=config.metrics,
            sinks=sinks,
            flops=self.flops,
            peak=peak,
            device=device,
            num_devices=self.dims.world_size,
            num_steps=config.training.steps,
            start_step=self.state.step,
            all_reduce=_all_reduce,
        )

    def _write_run_file(self, peak: Peak) -> None:
        write_run_file(
            self.run_folder,
            {
                "device": device_name(self.process.device),
                "mesh": dataclasses.asdict(self.dims),
                "applied": dataclasses.asdict(self.applied),
                "parameters": self.num_params,
                "stages": [dataclasses.asdict(stage) for stage in self.stages],
                "flops_per_token": dataclasses.asdict(self.flops) | {"formula": FORMULA},
                "peak": dataclasses.asdict(peak),
                "resumed_from_step": self.state.step,
                "config": self.config.model_dump(),
            },
        )


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    # Only from pinned memory does the copy leave the host free to go on.
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _all_reduce(tensor: Tensor, operation: str) -> Tensor:
    dist.all_reduce(tensor, op=getattr(dist.ReduceOp, operation.upper()))
    return tensor
