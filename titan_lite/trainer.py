"""The table of contents of a run: builds everything in order, then trains."""

import dataclasses
import itertools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from titan_lite.checkpoint.agreement import agree_on_start
from titan_lite.checkpoint.hf import DCPToHF, load_hf
from titan_lite.checkpoint.hf_files import HFFolder
from titan_lite.checkpoint.hf_layout import HFModel, check_start
from titan_lite.checkpoint.manager import CheckpointManager
from titan_lite.checkpoint.state import check_excluded
from titan_lite.config.load import ConfigError, LoadedConfig, Problem
from titan_lite.config.memory_advice import memory_advice
from titan_lite.data.held_out import HeldOut, read_held_out
from titan_lite.data.hf_documents import hf_documents
from titan_lite.data.loader import Batch, DataLoader, merge_states
from titan_lite.metrics.by_source import SourceMeter
from titan_lite.metrics.device import Peak, device_name, find_peak
from titan_lite.metrics.forward_times import ForwardTimes
from titan_lite.metrics.meter import Meter
from titan_lite.metrics.record import Record
from titan_lite.metrics.sinks import open_sinks
from titan_lite.metrics.warnings import LossWatch, slow_ranks, starving_ranks
from titan_lite.models.args import DecoderArgs
from titan_lite.models.rules import Plan
from titan_lite.nn.build import build
from titan_lite.objective import OBJECTIVES
from titan_lite.optim.loss_scaler import LossScaler
from titan_lite.optim.nonfinite import NonFiniteGuard
from titan_lite.optim.optimizer import build_optimizer
from titan_lite.optim.schedule import lr_factor
from titan_lite.outcomes import Outcomes
from titan_lite.parallel.async_tp import check_async_tp, count_fused
from titan_lite.parallel.build import build_parallel
from titan_lite.parallel.compile import Compilations
from titan_lite.parallel.context import check_cp, local_positions
from titan_lite.parallel.float8 import float8_problems, refresh_scales
from titan_lite.parallel.init_weights import init_weights
from titan_lite.parallel.mesh import build_meshes
from titan_lite.parallel.pipeline import Stage, split
from titan_lite.parallel.tensor import check_plan
from titan_lite.planner.counts import (
    FORMULA,
    FlopsPerToken,
    flops_per_token,
    num_last_matmul_params,
    num_unused_params,
)
from titan_lite.preflight import blaming, checkpoint_folder, preflight, run_folder
from titan_lite.runtime.distributed import (
    Process,
    check_dtype,
    record_flights,
    set_timeout,
    start_process_group,
    store_of_its_own,
)
from titan_lite.runtime.folder_lock import FolderLock
from titan_lite.runtime.garbage import collected_every
from titan_lite.runtime.out_of_memory import describe_out_of_memory
from titan_lite.runtime.profiler import check_profiling, profiling
from titan_lite.runtime.run_folder import (
    open_run_folder,
    update_run_file,
    write_run_file,
)
from titan_lite.runtime.seed import set_determinism
from titan_lite.runtime.stop import StopRequest
from titan_lite.runtime.watchdog import Watchdog
from titan_lite.step import StepResult, TrainStep

logger = logging.getLogger(__name__)


class Trainer:
    """One run. Building it is collective; `train` then does the steps that are left.

    What a run takes from outside (files, data, the device, sinks) enters through methods of its
    own, for the dry run to put others in their place.
    """

    held_out: HeldOut | None = None

    def __init__(
        self,
        loaded: LoadedConfig,
        plan: Plan,
        process: Process | None = None,
        *,
        stop: StopRequest | None = None,
    ) -> None:
        self.config = loaded.config
        self.plan, self.dims = plan, plan.dims
        self.stop = stop or StopRequest()
        self.progress = self.stop.progress
        self.process = process or Process.from_environment()
        self.run_folder = run_folder(loaded)
        self.locks: list[FolderLock] = []
        self._lock_folders(loaded)
        try:
            self._build(loaded, plan)
        except BaseException:
            self._unlock_folders()
            raise

    def _build(self, loaded: LoadedConfig, plan: Plan) -> None:
        config, training = self.config, self.config.training
        self.objective = OBJECTIVES[plan.family.objective](config)
        # What can be refused is refused before any process waits for another.
        self._find_files(loaded, plan)
        with torch.device("meta"):
            self.model = build(plan.family, plan.args)
        self.parameter_names = [name for name, _ in self.model.named_parameters()]
        with blaming("checkpoint.exclude_from_loading", loaded):
            check_excluded(config.checkpoint.exclude_from_loading, self.parameter_names)
        args = plan.args
        self.stages = self._split(loaded, args)
        if self.dims.tp > 1:
            with blaming("parallel.tp", loaded):
                check_plan(self.model, plan.family.tp_plan)
        self.num_params = self.model.num_parameters
        self.flops = self._count_flops(args)
        self._check_device(loaded, plan)
        self._open_initial_weights(loaded, plan)
        self.global_batch_size = training.global_batch_size
        if self.global_batch_size == -1:
            self.global_batch_size = training.local_batch_size * self.dims.batch
        self.micro_steps = self.global_batch_size // (training.local_batch_size * self.dims.batch)
        self._open_data(loaded)

        self._start_process_group()
        set_determinism(training.seed, deterministic=training.deterministic)
        self._agree_on_start(loaded)
        self.tokens: int | Tensor = self.state.tokens
        meshes = build_meshes(self.dims, self.process.device.type)
        # The meshes' groups do not inherit the timeout of the first one.
        self._set_timeout(config.comm.init_timeout_seconds)
        self.positions = self._local_positions()
        parallel_model = build_parallel(
            self.model,
            self.stages,
            plan,
            config,
            meshes,
            self.process,
            micro_steps=self.micro_steps,
        )
        self.pipeline, self.applied = parallel_model.pipeline, parallel_model.applied
        self.pp_group = meshes.pp
        self.compilations = Compilations() if config.compile.enable else None
        self._build_state()
        self.step = TrainStep(
            config,
            parallel_model,
            self.optimizer,
            self.guard,
            self.objective,
            vocab_size=plan.args.vocab_size,
            is_causal=plan.args.causal,
            positions=self.positions,
            device=self.process.device,
            progress=self.progress,
        )
        self.outcomes = self._build_outcomes()
        self.loss_watch = LossWatch()
        self.forward_times = ForwardTimes(self.model.layers.children(), self.process.device)
        self.logged_step = self.state.step
        self._resume(loaded)
        self.meter = self._build_meter()
        self.source_meter = None
        if sources := config.data.sources:
            names = [source.name for source in sources]
            self.source_meter = SourceMeter(names, self.state.source_tokens, _all_reduce)

    def _start_process_group(self) -> None:
        comm, hint = self.config.comm, ""
        if self.process.device.type == "cuda":
            hint = record_flights(self.run_folder)
        start_process_group(self.process, comm)
        self.watchdog = Watchdog(
            self.progress,
            store_of_its_own(),
            rank=self.process.rank,
            world_size=self.process.world_size,
            timeout=comm.init_timeout_seconds,
            tells=self.process.local_rank == 0,
            hint=hint,
        )

    def _set_timeout(self, seconds: int) -> None:
        set_timeout(seconds)
        self.watchdog.timeout = seconds

    def _lock_folders(self, loaded: LoadedConfig) -> None:
        if self.process.rank > 0:
            return
        folders = {"job.dump_folder": self.run_folder}
        checkpoints = checkpoint_folder(loaded)
        # Two runs may share one that is not below their own folders.
        is_elsewhere = not checkpoints.resolve().is_relative_to(self.run_folder.resolve())
        if self.config.checkpoint.enable and is_elsewhere:
            folders["checkpoint.folder"] = checkpoints
        try:
            for key, folder in folders.items():
                with blaming(key, loaded):
                    self.locks.append(FolderLock(folder, key))
        except BaseException:
            self._unlock_folders()
            raise

    def _unlock_folders(self) -> None:
        for lock in self.locks:
            lock.release()

    def _find_files(self, loaded: LoadedConfig, plan: Plan) -> None:
        """The tokenizer, and the state to begin from."""
        found = preflight(loaded, plan)
        self.tokenizer, self.start = found.tokenizer, found.start
        self.state = self.start.state

    def _agree_on_start(self, loaded: LoadedConfig) -> None:
        """Goes back to an earlier checkpoint where the contents of the latest are damaged."""
        found = self.start
        with blaming(found.key, loaded):
            self.start = agree_on_start(
                found,
                self.config.checkpoint,
                checkpoint_folder(loaded),
                last_step=self.config.training.steps,
            )
        if self.start is not found:
            self.state = self.start.state
            self.loader.close()
            self._open_data(loaded)

    def _build_state(self) -> None:
        """Weights, optimizer and what guards them, as they are at step 0."""
        config = self.config
        init_weights(
            self.model,
            device=self.process.device,
            seed=config.training.seed,
            cpu_offload=config.parallel.cpu_offload,
        )
        self.optimizer = build_optimizer(self.model, config.optimizer)
        device = next(self.model.parameters()).device
        self.guard: LossScaler | NonFiniteGuard
        if config.training.param_dtype == "float16":
            self.guard = LossScaler(device)
        else:
            self.guard = NonFiniteGuard(config.training.nonfinite, device)

    def _resume(self, loaded: LoadedConfig) -> None:
        """Loads the checkpoint to begin from, if there is one, and opens the run's folder."""
        config, start = self.config, self.start
        self.checkpoints = CheckpointManager(
            config.checkpoint,
            checkpoint_folder(loaded),
            model=self.model,
            optimizer=self.optimizer,
            device=self.process.device,
            layout=dataclasses.asdict(self.dims),
            config=config.model_dump(),
            timeout_seconds=config.comm.init_timeout_seconds,
        )
        if start.source is not None:
            with blaming(start.key, loaded):
                self.checkpoints.load(start)
            if self.state.guard:
                self.guard.load_state_dict(self.state.guard)
            logger.info("%s from %s", "Resumed" if start.resumes else "Begun", start.source)
        elif self.hf_folder is not None:
            load_hf(self.model, self.hf_folder, self.hf)
            logger.info("Weights are those of %s", self.hf_folder.path)
        if self.applied.count("float8 all-gather"):
            refresh_scales(self.model)
        if self.process.rank == 0:
            with blaming("job.dump_folder", loaded):
                open_run_folder(self.run_folder, resume_step=start.own_step)
            self.checkpoints.leave_later_branch(start.own_step)

    def _open_initial_weights(self, loaded: LoadedConfig, plan: Plan) -> None:
        """Finds the Hugging Face model to start from, if this is a start from one."""
        self.hf_folder: HFFolder | None = None
        path = self.config.checkpoint.initial_load_hf
        if path and self.start.source is None:
            with blaming("checkpoint.initial_load_hf", loaded):
                self.hf_folder = HFFolder.open(Path(path).expanduser())
                self.hf = HFModel.of(plan.family, plan.args)
                check_start(self.hf_folder, self.hf, plan.family, plan.args)

    def _split(self, loaded: LoadedConfig, args: DecoderArgs) -> list[Stage]:
        """The pipeline stages of the whole model."""
        parallel, seq_len = self.config.parallel, self.config.training.seq_len
        key = "pp_stage_modules" if parallel.pp_split == "explicit" else "pp"
        with blaming(f"parallel.{key}", loaded):
            stages = split(
                self.model,
                parallel,
                attention_flops=12 * args.attention_dim * seq_len,
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
        recomputed = [section.layers(stage.blocks) for stage in self.stages]
        num_params = self.num_params - num_unused_params(args)
        if self.config.training.loss_positions == "labelled":
            # The head multiplies no other tokens.
            share = 1 - self.objective.labelled_share
            num_params -= round(share * args.vocab_size * args.dim)
        return flops_per_token(
            num_params_non_embedding=num_params,
            num_block_params=sum(p.numel() for p in self.model.layers.parameters()),
            num_last_matmul_params=num_last_matmul_params(args),
            num_layers=args.num_layers,
            attention_dim=args.attention_dim,
            seq_len=self.config.training.seq_len,
            is_causal=args.causal,
            num_recomputed_layers=(
                0 if section.mode == "selective_op" else sum(map(len, recomputed))
            ),
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
        """Reads what is held out, opens the data where the run's state says: the first batch."""
        with blaming("data.tokenizer_path", loaded):
            self.rows = self.objective.rows(self.tokenizer)
        if self.config.validation.enable and self.held_out is None:
            with blaming("validation.dataset", loaded):
                self.held_out = self._read_held_out()
        self.loader = self.build_loader()
        if self.state.step > 0:
            with blaming(self.start.key, loaded):
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
        return DataLoader(self.config.data, seed=self.config.training.seed, **self._share())

    def _read_held_out(self) -> HeldOut:
        """This rank's share of what is validated on."""
        return read_held_out(self.config.validation, self.config.data, **self._share())

    def _share(self) -> dict[str, Any]:
        """How global batches are cut, and which part of them is this rank's."""
        training = self.config.training
        return {
            "seq_len": training.seq_len,
            "local_batch_size": training.local_batch_size,
            "global_batch_size": self.global_batch_size,
            "batch_rank": self.dims.batch_rank(self.process.rank),
            "batch_degree": self.dims.batch,
            "tokenizer": self.tokenizer,
            "rows": self.rows,
        }

    def train(self) -> None:
        """Trains up to `training.steps`, logging, saving and profiling on the way; collective."""
        first, last = self.state.step + 1, self.config.training.steps
        if first > last:
            logger.info("Step %d of %d is done already: nothing is left to train", first - 1, last)
            self.save_hf()
            return
        comm, profile_folder = self.config.comm, self.run_folder / "profile"
        with (
            collected_every(self.config.training.gc_freq) as collect,
            profiling(self.config.profiling, profile_folder, self.process.rank) as profile,
        ):
            for step in range(first, last + 1):
                self.train_step(step)
                if step == first:
                    self._set_timeout(comm.train_timeout_seconds)
                    self.report_compiled()
                stops = self.outcomes.is_stopping and self.config.checkpoint.enable
                if stops or self.checkpoints.should_save(step, last):
                    self.outcomes.read()
                    # The slowest disk of all is waited for: longer than a step may take.
                    self._set_timeout(comm.init_timeout_seconds)
                    with self.meter.excluded():
                        self.save()
                    self._set_timeout(comm.train_timeout_seconds)
                collect(step)
                profile(step)
                if self.outcomes.is_stopping and step < last:
                    break
            self._set_timeout(comm.init_timeout_seconds)
            with self.meter.excluded():
                self.checkpoints.wait()
            self._set_timeout(comm.train_timeout_seconds)
        if self.state.step < last:
            self._say_stopped()
            return
        self.outcomes.is_stopping = False
        self.save_hf()
        logger.info("Everything is in %s\n%s", self.run_folder, self.meter.summary())

    def close(self) -> None:
        """Stops the loader's worker, lets a save end, closes metric files, leaves the folder."""
        self.loader.close()
        self.checkpoints.close()
        self.meter.close()
        self.watchdog.close()
        self._unlock_folders()

    def train_step(self, step: int) -> Record | None:
        """One optimizer step over the global batch; collective. Returns its record if logged."""
        training = self.config.training
        self.progress.enter("data", step=step)
        with self.meter.waiting_for_data():
            batches = [next(self.batches) for _ in range(self.micro_steps)]
        lr = self.config.optimizer.lr * lr_factor(step, self.config.lr_scheduler, training.steps)
        self.forward_times.start_step()
        try:
            result = self.step(batches, lr, stop=self.stop.signal is not None)
        except torch.OutOfMemoryError as error:
            advice = memory_advice(self.config, self.dims)
            logger.error("%s", describe_out_of_memory(error, self.process.device, advice))
            raise
        self.progress.enter("log")
        if self.compilations is not None:
            for reason in self.compilations.after_step():
                logger.warning(
                    "Step %d compiled anew (%d times so far since the warm-up): %s",
                    step,
                    self.compilations.recompilations,
                    reason,
                )
        tokens: int | Tensor = self.global_batch_size * training.seq_len
        if self.objective.has_padding:
            # A number that the host does not wait for.
            tokens = result.num_tokens
        self.state.step = step
        self.tokens += tokens
        self.meter.add(tokens=tokens, samples=self.global_batch_size)
        if self.source_meter is not None and result.source_valid is not None:
            self.source_meter.add(result.source_valid)
        logs = self.meter.should_log(step) or self.validates(step)
        # One step late, the device has work while the host waits.
        late = self.process.device.type == "cuda" and not logs
        self.outcomes.add(step, result)
        self.outcomes.read(keep=int(late))
        validated = self.validate(step)
        if not logs:
            return None
        extra = self.checkpoints.metrics() | self.guard.metrics() | self._skipped_documents()
        extra |= validated | self._by_source(result)
        extra |= self.objective.metrics(result.loss, result.sums, result.num_pairs)
        times = self._times_by_rank()
        record = self.meter.log(
            step,
            loss=result.loss,
            grad_norm=result.grad_norm,
            lr=lr,
            tokens_seen=int(self.tokens),
            extra=extra,
        )
        if isinstance(self.guard, LossScaler):
            self.guard.check(step, record["grad_norm"])
        self._warn(record, *times)
        return record

    def _times_by_rank(self) -> tuple[list[float], list[float]]:
        """Seconds that each rank waited for data since the last log step, and of a step's forward.

        Collective.
        """
        mine = (self.meter.data_wait, self.forward_times.seconds() * self.micro_steps)
        times = torch.zeros(len(mine), self.process.world_size, device=self.process.device)
        times[:, self.process.rank] = torch.tensor(mine)
        waits, forward = _all_reduce(times, "sum").tolist()
        return waits, forward

    def _warn(self, record: Record, waits: list[float], forward: list[float]) -> None:
        """Of what somebody should look at; once, by rank 0."""
        step, first = int(record["step"]), self.logged_step + 1
        self.logged_step = step
        if self.process.rank > 0 or record.get("warmup"):
            return
        spike = self.loss_watch.look(step, record["loss"])
        per_step = [wait / (step + 1 - first) for wait in waits]
        starving = starving_ranks(step, per_step, record["seconds_per_step"])
        stages = [self.dims.coordinates(rank)["pp"] for rank in range(self.dims.world_size)]
        slow = slow_ranks(step, forward, stages, record["seconds_per_step"])
        for sentence in [*filter(None, [spike]), *starving, *slow]:
            logger.warning("%s", sentence)

    def _skipped_documents(self) -> dict[str, float]:
        """For a log record; collective."""
        if self.config.data.on_bad_document == "raise":
            return {}
        # Ranks that share a stream may differ in how far they have read it.
        counts = torch.tensor(self.loader.num_skipped(), device=self.process.device)
        return {"skipped_documents": _all_reduce(counts, "max").sum().item()}

    def _say_stopped(self) -> None:
        saved = "a checkpoint was saved" if self.config.checkpoint.enable else "nothing was saved"
        logger.warning(
            "Stopped after step %d, as %s asked: %s",
            self.state.step,
            self.stop.signal or "another rank",
            saved,
        )

    def validates(self, step: int) -> bool:
        """Whether the loss over held-out documents is computed after this step."""
        if self.held_out is None:
            return False
        return step % self.config.validation.interval == 0 or step == self.config.training.steps

    def _by_source(self, result: StepResult) -> dict[str, float]:
        """For a log record; collective."""
        if self.source_meter is None:
            return {}
        assert result.source_losses is not None
        assert result.source_valid is not None
        return self.source_meter.metrics(
            result.source_losses, result.source_valid, self.loader.epochs()
        )

    def validate(self, step: int) -> dict[str, float]:
        """Metrics over the held-out documents, of the steps that have any; collective."""
        if self.held_out is None or not self.validates(step):
            return {}
        comm = self.config.comm
        # The first one compiles.
        self._set_timeout(comm.init_timeout_seconds)
        with self.meter.excluded():
            sums = self.step.evaluate(self.held_out.batches)
            metrics = self.objective.validation(sums, self.held_out)
        self._set_timeout(comm.train_timeout_seconds)
        if self.compilations is not None:
            self.compilations.after_validation()
        return metrics

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
        """Saves a checkpoint of the step just done, or begins to; collective."""
        self.progress.enter("save")
        states: list[dict[str, Any]] = [{}] * self.process.world_size
        dist.all_gather_object(states, self.loader.state_dict())
        self.state.tokens = int(self.tokens)
        if self.source_meter is not None:
            self.state.source_tokens = self.source_meter.tokens()
        self.state.data = merge_states(states)
        self.state.guard = self.guard.state_dict()
        is_last = self.state.step == self.config.training.steps
        self.checkpoints.save(self.state, is_last=is_last)

    def save_hf(self) -> None:
        """Writes the last step's checkpoint for Hugging Face transformers, if asked; collective."""
        if not self.config.checkpoint.last_save_hf or self.state.step < self.config.training.steps:
            return
        self.progress.enter("save")
        self._set_timeout(self.config.comm.init_timeout_seconds)
        family, args = self.plan.family, self.plan.args
        assert family.hf_config is not None
        export = DCPToHF(self.checkpoints.folder / f"step-{self.state.step}", family, args)
        target = self.checkpoints.folder / "hf"
        export.write(
            target, hf_documents(args, family.hf_config, self.tokenizer, dtype=export.dtype)
        )
        logger.info("Hugging Face model written to %s", target)

    def _build_outcomes(self) -> Outcomes:
        return Outcomes(self.guard, self.parameter_names)

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
                settings=config.model_dump(),
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


def _all_reduce(tensor: Tensor, operation: str) -> Tensor:
    dist.all_reduce(tensor, op=getattr(dist.ReduceOp, operation.upper()))
    return tensor
