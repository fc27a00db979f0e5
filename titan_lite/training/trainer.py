"""The training loop: steps, validation and checkpoints."""

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist

from titan_lite.checkpoint.manager import CheckpointManager
from titan_lite.checkpoint.state import RunState
from titan_lite.config.memory_advice import memory_advice
from titan_lite.data.tokenizer import Tokenizer
from titan_lite.metrics.device import device_name
from titan_lite.metrics.record import Record
from titan_lite.models.plan import Plan
from titan_lite.optim.schedule import LRSchedule
from titan_lite.parallel.async_tp import count_fused
from titan_lite.parallel.compile import Compilations
from titan_lite.planner.hardware import find_device
from titan_lite.planner.predict import fitting_settings
from titan_lite.runtime.distributed import Process
from titan_lite.runtime.out_of_memory import describe_out_of_memory
from titan_lite.runtime.progress import Progress
from titan_lite.runtime.run_folder import update_run_file
from titan_lite.runtime.stop import StopRequest
from titan_lite.runtime.watchdog import Watchdog
from titan_lite.training.export import export_hf
from titan_lite.training.run_data import RunData
from titan_lite.training.setup import BuiltTraining
from titan_lite.training.step import StepResult
from titan_lite.training.step_monitor import StepMonitor

logger = logging.getLogger(__name__)


class Watcher(Protocol):
    """An observer of each step; if it is a context manager, it is entered around the loop."""

    def after_step(self, step: int, result: StepResult) -> None:
        """Called after each step, when its work is queued on the device (it may be unfinished)."""


@dataclass(kw_only=True)
class Trainer:
    """An opened run: `train` runs the remaining steps, `close` releases its resources.

    opened: the resources, such as locks, workers and files.
    """

    plan: Plan
    process: Process
    stop: StopRequest
    progress: Progress
    state: RunState
    tokenizer: Tokenizer
    built: BuiltTraining
    data: RunData
    checkpoints: CheckpointManager
    monitor: StepMonitor
    watchers: Sequence[Watcher]
    compilations: Compilations | None
    watchdog: Watchdog
    opened: contextlib.ExitStack
    schedule: LRSchedule = field(init=False)

    def __post_init__(self) -> None:
        config = self.plan.config
        self.schedule = LRSchedule(config.optimizer.lr, config.lr_scheduler, config.training.steps)

    @property
    def is_stopping(self) -> bool:
        """True if a rank has received a stop signal and steps are left."""
        is_done = self.state.step >= self.plan.config.training.steps
        return self.monitor.unread_results.is_stopping and not is_done

    def train(self) -> None:
        """Trains up to `training.steps`, with logs, checkpoints and profiles; collective."""
        config = self.plan.config
        first, last = self.state.step + 1, config.training.steps
        if first > last:
            logger.info("Step %d of %d is already done; no step is left to train", first - 1, last)
            self._export()
            return
        compiles = "; the first step compiles, which can take minutes"
        logger.info(
            "Training from step %d to %d%s", first, last, compiles if self.compilations else ""
        )
        with contextlib.ExitStack() as stack:
            for watcher in self.watchers:
                if isinstance(watcher, contextlib.AbstractContextManager):
                    stack.enter_context(watcher)
            for step in range(first, last + 1):
                self.train_step(step)
                if step == first:
                    self.watchdog.set_timeout(config.comm.train_timeout_seconds)
                    self.report_compiled()
                saves_for_stop = self.is_stopping and config.checkpoint.enable
                if saves_for_stop or self.checkpoints.should_save(step, last):
                    self.monitor.unread_results.read()
                    # All ranks wait here for the slowest one, so this is not counted as step time.
                    with self._outside_steps():
                        self.save()
                # Tested again: the results read before a save may contain a stop signal.
                if self.is_stopping:
                    break
            with self._outside_steps():
                self.checkpoints.wait()
        if self.state.step < last:
            self._log_stopped()
            return
        self._export()
        summary = self.monitor.meter.summary()
        logger.info("Everything is in %s\n%s", self.plan.run_folder, summary)

    def train_step(self, step: int) -> Record | None:
        """Runs one step over the global batch; collective. Returns its record if logged."""
        monitor = self.monitor
        self.progress.enter("data", step=step)
        with monitor.meter.waiting_for_data():
            batches = [next(self.data.batches) for _ in range(self.plan.micro_steps)]
        lr = self.schedule(step)
        monitor.forward_times.start_step()
        try:
            result = self.built.train_step(batches, lr, stop=self.stop.signal is not None)
        except torch.OutOfMemoryError as error:
            advice = advise_on_memory(self.plan, self.process.device)
            logger.error("%s", describe_out_of_memory(error, self.process.device, advice))
            raise
        self.progress.enter("log")
        self.state.step = step
        for watcher in self.watchers:
            watcher.after_step(step, result)
        should_validate = self._should_validate(step)
        should_log = should_validate or monitor.meter.should_log(step)
        monitor.count_step(step, result, should_log=should_log)
        if not should_log:
            return None
        validated = self.validate() if should_validate else {}
        return monitor.log(step, result, lr, self.checkpoints.metrics() | validated)

    def validate(self) -> dict[str, float]:
        """Returns metrics over the held-out documents; collective."""
        held_out = self.data.held_out
        assert held_out is not None
        # Speeds exclude the time of validation. The first validation compiles, and needs the longer
        # timeout.
        with self._outside_steps():
            sums = self.built.train_step.evaluate(held_out.batches)
            metrics = self.built.objective.validation(sums, held_out)
        if self.compilations is not None:
            self.compilations.after_validation()
        return metrics

    def _should_validate(self, step: int) -> bool:
        """Returns whether a validation follows this step."""
        if self.data.held_out is None:
            return False
        config = self.plan.config
        return step % config.validation.interval == 0 or step == config.training.steps

    def save(self) -> None:
        """Saves a checkpoint of the step just done, or starts an async save; collective."""
        self.progress.enter("save")
        self.state.tokens = int(self.monitor.tokens)
        is_last = self.state.step == self.plan.config.training.steps
        self.checkpoints.save(self.state, is_last=is_last)

    def report_compiled(self) -> None:
        """Adds the number of compiled graphs to the report; called after the first step."""
        if self.compilations is None:
            return
        counts: dict[str, Any] = {"compiled_graphs": self.compilations.graphs}
        if self.plan.config.parallel.async_tp:
            counts |= count_fused()
        applied = self.built.applied = dataclasses.replace(self.built.applied, **counts)
        logger.info("The first step compiled %s", applied.compiled())
        if self.plan.config.parallel.async_tp:
            applied.check_async_tp()
        if self.process.rank == 0:
            update_run_file(self.plan.run_folder, {"applied": dataclasses.asdict(applied)})

    def close(self) -> None:
        """Finishes a save, closes metric files, stops the loader's worker, unlocks the folders."""
        self.opened.close()

    @contextlib.contextmanager
    def _outside_steps(self) -> Iterator[None]:
        """Excludes the `with` body from measured speeds; allows it more time; collective."""
        comm = self.plan.config.comm
        self.watchdog.set_timeout(comm.init_timeout_seconds)
        with self.monitor.meter.excluded():
            yield
        self.watchdog.set_timeout(comm.train_timeout_seconds)

    def _export(self) -> None:
        """Exports the last checkpoint if checkpoint.last_save_hf is true; collective."""
        if self.plan.config.checkpoint.last_save_hf:
            self.progress.enter("save")
            self.watchdog.set_timeout(self.plan.config.comm.init_timeout_seconds)
            # Not training.steps, which may have been lowered below the last checkpoint's step.
            checkpoint = self.checkpoints.folder / f"step-{self.state.step}"
            export_hf(self.plan, checkpoint, self.tokenizer, self.process.rank)

    def _log_stopped(self) -> None:
        """Logs the signal that stopped the run, on whichever rank it arrived; collective."""
        reasons: list[str | None] = [None] * self.process.world_size
        dist.all_gather_object(reasons, self.stop.signal)
        if self.process.rank > 0:
            return
        is_saved = self.plan.config.checkpoint.enable
        saved = "a checkpoint was saved" if is_saved else "nothing was saved"
        reason = next(filter(None, reasons))
        logger.warning("Stopped after step %d (%s): %s", self.state.step, reason, saved)


def advise_on_memory(plan: Plan, device: torch.device) -> list[str]:
    """Returns settings that fit by the planner's estimate, or general advice if it finds none."""
    known = find_device(device_name(device))
    fitting = fitting_settings(plan, known) if known and known.memory_gb else []
    return fitting or memory_advice(plan.config, plan.dims)
