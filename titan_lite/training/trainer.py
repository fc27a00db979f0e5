"""The table of contents of a run: builds everything in order, then trains."""

import contextlib
import dataclasses
import itertools
import logging
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from titan_lite.checkpoint.agreement import agree_on_data, agree_on_start
from titan_lite.checkpoint.hf import DCPToHF, load_hf
from titan_lite.checkpoint.manager import CheckpointManager
from titan_lite.checkpoint.same_model import model_facts
from titan_lite.checkpoint.storage import versions
from titan_lite.config.memory_advice import memory_advice
from titan_lite.config.problems import about
from titan_lite.data.export_check import README, export_report
from titan_lite.data.held_out import HeldOut, read_held_out
from titan_lite.data.hf_documents import hf_documents
from titan_lite.data.loader import Batch, DataLoader, merge_states
from titan_lite.metrics.build import build_meter
from titan_lite.metrics.by_source import SourceMeter
from titan_lite.metrics.device import device_name
from titan_lite.metrics.forward_times import ForwardTimes
from titan_lite.metrics.record import Record
from titan_lite.metrics.warnings import RecordWatch
from titan_lite.models.plan import Plan
from titan_lite.optim.schedule import Schedule
from titan_lite.parallel.async_tp import count_fused
from titan_lite.parallel.compile import Compilations
from titan_lite.parallel.mesh import build_meshes
from titan_lite.planner.counts import FORMULA
from titan_lite.planner.hardware import find_device
from titan_lite.planner.predict import fitting_settings
from titan_lite.runtime.distributed import (
    Process,
    all_reduce,
    record_flights,
    set_timeout,
    start_process_group,
    store_of_its_own,
)
from titan_lite.runtime.garbage import collected_every
from titan_lite.runtime.out_of_memory import describe_out_of_memory
from titan_lite.runtime.profiler import profiling
from titan_lite.runtime.run_folder import (
    RUN_FILE,
    open_run_folder,
    update_run_file,
    write_run_file,
)
from titan_lite.runtime.seed import set_determinism
from titan_lite.runtime.stop import StopRequest
from titan_lite.runtime.watchdog import Watchdog
from titan_lite.runtime.writing import writing
from titan_lite.training.meta_model import (
    build_meta_model,
    check_device,
    open_hf_weights,
    pipeline_stages,
)
from titan_lite.training.objective import OBJECTIVES
from titan_lite.training.preflight import (
    check_model,
    lock_folders,
    preflight,
)
from titan_lite.training.resuming import log_changes
from titan_lite.training.setup import build_training
from titan_lite.training.step import StepResult
from titan_lite.training.step_monitor import Outcomes

logger = logging.getLogger(__name__)


class Trainer:
    """One run. Building it is collective; `train` then does the steps that are left."""

    held_out: HeldOut | None = None

    def __init__(
        self,
        plan: Plan,
        process: Process | None = None,
        *,
        stop: StopRequest | None = None,
    ) -> None:
        self.config = plan.config
        self.plan, self.dims = plan, plan.dims
        self.stop = stop or StopRequest()
        self.progress = self.stop.progress
        self.process = process or Process.from_environment()
        self.locks = contextlib.ExitStack()
        try:
            with plan.reporting():
                self._build()
        except BaseException:
            self.locks.close()
            raise

    def _build(self) -> None:
        plan, config = self.plan, self.config
        # What can be refused is refused before any process waits for another.
        self._find_files()
        model = build_meta_model(plan)
        pipeline_stages(plan, model, head_share=1.0)
        check_device(plan, model, self.process.device)
        self.objective = OBJECTIVES[plan.family.objective](config)
        self._open_data()

        set_determinism(config.training.seed, deterministic=config.training.deterministic)
        self._join()
        self.tokens: int | Tensor = self.state.tokens
        meshes = build_meshes(self.dims, self.process.device.type)
        # The meshes' groups do not inherit the timeout of the first one.
        self._set_timeout(config.comm.init_timeout_seconds)
        logger.info("Building the model: %s parameters", f"{model.num_parameters:,}")
        self.training = build_training(plan, model, meshes, self.process, progress=self.progress)
        self.applied = self.training.applied
        self.schedule = Schedule(config.optimizer.lr, config.lr_scheduler, config.training.steps)
        self.compilations = Compilations() if config.compile.enable else None
        self._resume()
        self._start_measuring()
        self.forward_times = ForwardTimes(
            self.training.model.layers.children(),
            self.process.device,
            compiled=config.compile.covers("model"),
        )
        pp_ranks = [self.dims.coordinates(rank)["pp"] for rank in range(self.dims.world_size)]
        self.watch = RecordWatch(self.process, pp_ranks, start_step=self.state.step)
        self.source_meter = None
        if sources := config.data.sources:
            names = [source.name for source in sources]
            self.source_meter = SourceMeter(names, self.state.source_tokens, all_reduce)

    def _find_files(self) -> None:
        """Locks the folders; finds the tokenizer, the state and the weights to begin from."""
        if self.process.rank == 0:
            self.locks = lock_folders(self.plan)
        found = preflight(self.plan)
        self.tokenizer, self.start = found.tokenizer, found.start
        self.state = self.start.state
        self.hf = open_hf_weights(self.plan) if self.start.source is None else None

    def _open_data(self) -> None:
        """Reads what is held out, opens the data where the run's state says: the first batch."""
        config = self.config
        with about("data.tokenizer_path"):
            self.rows = self.objective.rows(self.tokenizer)
        if config.validation.enable and self.held_out is None:
            with about("validation.dataset"):
                self.held_out = read_held_out(config.validation, config.data, **self._share())
        self.loader = self.build_loader()
        if self.state.step > 0:
            with about(self.start.key):
                self.loader.load_state_dict(self.state.data)
        # Documents that cannot be read are a mistake to answer now, not in the first step.
        with about("data.dataset"):
            batches = iter(self.loader)
            self.batches: Iterator[Batch] = itertools.chain([next(batches)], batches)

    def build_loader(self) -> DataLoader:
        """A loader of this rank's share of the run's samples, from the first one on."""
        return DataLoader(self.config.data, seed=self.config.training.seed, **self._share())

    def _share(self) -> dict[str, Any]:
        """How global batches are cut, and which part of them is this rank's."""
        training = self.config.training
        return {
            "seq_len": training.seq_len,
            "local_batch_size": training.local_batch_size,
            "global_batch_size": self.plan.global_batch_size,
            "batch_rank": self.dims.batch_rank(self.process.rank),
            "batch_degree": self.dims.batch,
            "tokenizer": self.tokenizer,
            "rows": self.rows,
        }

    def _join(self) -> None:
        """Starts the process group, whose ranks agree on what they begin from."""
        comm, hint = self.config.comm, ""
        if self.process.device.type == "cuda":
            hint = record_flights(self.plan.run_folder)
        start_process_group(self.process, comm)
        with about("data.dataset"):
            agree_on_data(self.loader.state_dict()["settings"])
        self.watchdog = Watchdog(
            self.progress,
            store_of_its_own(),
            rank=self.process.rank,
            world_size=self.process.world_size,
            timeout=comm.init_timeout_seconds,
            tells=self.process.local_rank == 0,
            hint=hint,
        )
        found = self.start
        with about(found.key):
            self.start = agree_on_start(
                found,
                self.config.checkpoint,
                self.plan.checkpoint_folder,
                last_step=self.config.training.steps,
            )
        if self.start is not found:
            # An earlier checkpoint: the contents of the latest are damaged.
            check_model(self.start, self.plan)
            self.state = self.start.state
            self.loader.close()
            self._open_data()

    def _resume(self) -> None:
        """Loads the checkpoint to begin from, if there is one, and opens the run's folder."""
        config, start = self.config, self.start
        self.checkpoints = CheckpointManager(
            config.checkpoint,
            self.plan.checkpoint_folder,
            model=self.training.model,
            optimizer=self.training.optimizer,
            device=self.process.device,
            layout=dataclasses.asdict(self.dims),
            config=config.model_dump(),
            tokenizer=self.tokenizer.fingerprint,
            model_facts=model_facts(self.plan.family.name, self.plan.args),
            timeout_seconds=config.comm.init_timeout_seconds,
        )
        if start.source is not None:
            with about(start.key):
                self.checkpoints.load(start)
            if self.state.guard:
                self.training.guard.load_state_dict(self.state.guard)
            logger.info("%s from %s", "Resumed" if start.resumes else "Begun", start.source)
            if start.manifest is not None and start.content == "run" and self.process.rank == 0:
                log_changes(start.manifest, self.plan, versions())
        elif self.hf is not None:
            folder, _ = self.hf
            load_hf(self.training.model, *self.hf)
            logger.info("Weights are those of %s", folder.path)
        self.training.step.refresh()
        if self.process.rank == 0:
            open_run_folder(self.plan.run_folder, resume_step=start.own_step)
            self.checkpoints.leave_later_branch(start.own_step)

    def _set_timeout(self, seconds: int) -> None:
        set_timeout(seconds)
        self.watchdog.timeout = seconds

    @contextlib.contextmanager
    def _outside_steps(self) -> Iterator[None]:
        """For what may take longer than a step, and counts in no speed; collective."""
        comm = self.config.comm
        self._set_timeout(comm.init_timeout_seconds)
        with self.meter.excluded():
            yield
        self._set_timeout(comm.train_timeout_seconds)

    def train(self) -> None:
        """Trains up to `training.steps`, logging, saving and profiling on the way; collective."""
        first, last = self.state.step + 1, self.config.training.steps
        if first > last:
            logger.info("Step %d of %d is done already: nothing is left to train", first - 1, last)
            self.save_hf()
            return
        compiles = "; the first step compiles, which can take minutes"
        logger.info(
            "Training from step %d to %d%s", first, last, compiles if self.compilations else ""
        )
        profile_folder = self.plan.run_folder / "profile"
        with (
            collected_every(self.config.training.gc_freq) as collect,
            profiling(self.config.profiling, profile_folder, self.process.rank) as profile,
        ):
            for step in range(first, last + 1):
                self.train_step(step)
                if step == first:
                    self._set_timeout(self.config.comm.train_timeout_seconds)
                    self.report_compiled()
                stops = self.outcomes.is_stopping and self.config.checkpoint.enable
                if stops or self.checkpoints.should_save(step, last):
                    self.outcomes.read()
                    # The slowest disk of all is waited for.
                    with self._outside_steps():
                        self.save()
                collect(step)
                profile(step)
                if self.outcomes.is_stopping and step < last:
                    break
            with self._outside_steps():
                self.checkpoints.wait()
        if self.state.step < last:
            self._say_stopped()
            return
        self.outcomes.is_stopping = False
        self.save_hf()
        logger.info("Everything is in %s\n%s", self.plan.run_folder, self.meter.summary())

    def close(self) -> None:
        """Stops the loader's worker, lets a save end, closes metric files, leaves the folder."""
        self.loader.close()
        self.checkpoints.close()
        self.meter.close()
        self.watchdog.close()
        self.locks.close()

    def _memory_advice(self) -> list[str]:
        """Settings that would fit, by the planner where it knows the device."""
        plan, device = self.plan, find_device(device_name(self.process.device))
        if device is not None and device.memory_gb is not None:
            fitting = fitting_settings(plan.config, plan.dims, plan.family, plan.args, device)
            if fitting:
                return fitting
        return memory_advice(self.config, self.dims)

    def train_step(self, step: int) -> Record | None:
        """One optimizer step over the global batch; collective. Returns its record if logged."""
        training = self.config.training
        self.progress.enter("data", step=step)
        with self.meter.waiting_for_data():
            batches = [next(self.batches) for _ in range(self.plan.micro_steps)]
        lr = self.schedule(step)
        self.forward_times.start_step()
        try:
            result = self.training.step(batches, lr, stop=self.stop.signal is not None)
        except torch.OutOfMemoryError as error:
            advice = self._memory_advice()
            logger.error("%s", describe_out_of_memory(error, self.process.device, advice))
            raise
        self.progress.enter("log")
        if self.compilations is not None:
            self.compilations.after_step(step)
        tokens: int | Tensor = self.plan.global_batch_size * training.seq_len
        if self.objective.has_padding:
            # A number that the host does not wait for.
            tokens = result.num_tokens
        self.state.step = step
        self.tokens += tokens
        self.meter.add(tokens=tokens, samples=self.plan.global_batch_size)
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
        extra = (
            self.checkpoints.metrics() | self.training.guard.metrics() | self._data_metrics(result)
        )
        extra |= validated
        extra |= self.objective.metrics(result.loss, result.sums, result.num_pairs)
        waited = self.meter.data_wait
        record = self.meter.log(
            step,
            loss=result.loss,
            grad_norm=result.grad_norm,
            lr=lr,
            tokens_seen=int(self.tokens),
            extra=extra,
        )
        self.training.guard.check(step, record["grad_norm"])
        self.watch.look(record, waited, self.forward_times.seconds() * self.plan.micro_steps)
        return record

    def _data_metrics(self, result: StepResult) -> dict[str, float]:
        """Of what was read, for a log record; collective."""
        found: dict[str, float] = {}
        if self.config.data.on_bad_document != "raise":
            # Ranks that share a stream may differ in how far they have read it.
            counts = torch.tensor(self.loader.num_skipped(), device=self.process.device)
            found["skipped_documents"] = all_reduce(counts, "max").sum().item()
        if self.source_meter is not None:
            assert result.source_losses is not None
            assert result.source_valid is not None
            found |= self.source_meter.metrics(
                result.source_losses, result.source_valid, self.loader.epochs()
            )
        return found

    def _say_stopped(self) -> None:
        """Logs why the run stopped, whichever rank was asked; collective."""
        reasons: list[str | None] = [None] * self.process.world_size
        dist.all_gather_object(reasons, self.stop.signal)
        if self.process.rank > 0:
            return
        saved = "a checkpoint was saved" if self.config.checkpoint.enable else "nothing was saved"
        reason = next(filter(None, reasons))
        logger.warning("Stopped after step %d (%s): %s", self.state.step, reason, saved)

    def validates(self, step: int) -> bool:
        """Whether the loss over held-out documents is computed after this step."""
        if self.held_out is None:
            return False
        return step % self.config.validation.interval == 0 or step == self.config.training.steps

    def validate(self, step: int) -> dict[str, float]:
        """Metrics over the held-out documents, of the steps that have any; collective."""
        if self.held_out is None or not self.validates(step):
            return {}
        # The first one compiles.
        with self._outside_steps():
            sums = self.training.step.evaluate(self.held_out.batches)
            metrics = self.objective.validation(sums, self.held_out)
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
            update_run_file(self.plan.run_folder, {"applied": dataclasses.asdict(self.applied)})

    def save(self) -> None:
        """Saves a checkpoint of the step just done, or begins to; collective."""
        self.progress.enter("save")
        states: list[dict[str, Any]] = [{}] * self.process.world_size
        dist.all_gather_object(states, self.loader.state_dict())
        self.state.tokens = int(self.tokens)
        if self.source_meter is not None:
            self.state.source_tokens = self.source_meter.tokens()
        self.state.data = merge_states(states)
        self.state.guard = self.training.guard.state_dict()
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
        documents = hf_documents(args, family.hf_config, self.tokenizer, dtype=export.dtype)
        if self.process.rank == 0:
            # The preflight has refused a difference, unless it is on purpose.
            report = export_report(
                documents, self.tokenizer, self.config.data, of_pairs=not args.causal
            )
            documents[README] = report.readme()
            logger.log(logging.INFO if report.is_same else logging.WARNING, "%s", report.sentence)
        with writing(target):
            export.write(target, documents)
        logger.info("Hugging Face model written to %s", target)

    def _start_measuring(self) -> None:
        """Says in the log and in run.json what this run is, and opens where its records go."""
        config, process = self.config, self.process
        logger.info(
            "%s%s %s: %s parameters on %d x %s. Applied:\n%s",
            f"{config.job.description}. " if config.job.description else "",
            config.model.name,
            config.model.flavor,
            f"{self.training.num_params:,}",
            self.dims.world_size,
            device_name(process.device),
            self.applied,
        )
        self.outcomes = Outcomes(self.training.guard, self.training.parameter_names)
        self.meter = build_meter(
            config, process, self.plan.run_folder, self.training.flops, start_step=self.state.step
        )
        # A finished run stays described by the settings that trained it.
        is_done = self.state.step >= config.training.steps
        if process.rank > 0 or (is_done and (self.plan.run_folder / RUN_FILE).exists()):
            return
        write_run_file(
            self.plan.run_folder,
            {
                "device": device_name(process.device),
                "mesh": dataclasses.asdict(self.dims),
                "applied": dataclasses.asdict(self.applied),
                "parameters": self.training.num_params,
                "stages": [dataclasses.asdict(stage) for stage in self.training.stages],
                "flops_per_token": dataclasses.asdict(self.training.flops) | {"formula": FORMULA},
                "peak": dataclasses.asdict(self.meter.peak),
                "config": config.model_dump(),
            },
            resumed_from_step=self.state.step,
        )
