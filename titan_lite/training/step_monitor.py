"""Measures the steps of a run, and reads their results from the device."""

import logging
from collections import deque
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from titan_lite.checkpoint.state import RunState
from titan_lite.data.loader import DataLoader
from titan_lite.metrics.alerts import RecordWatch
from titan_lite.metrics.build_meter import build_meter
from titan_lite.metrics.by_source import SourceMeter
from titan_lite.metrics.forward_times import ForwardTimes
from titan_lite.metrics.record import Record
from titan_lite.models.plan import Plan
from titan_lite.nn.init import CHECKPOINT_PREFIX
from titan_lite.optim.nonfinite import NonFiniteError, NonFiniteGuard
from titan_lite.runtime.distributed import Process, all_reduce
from titan_lite.runtime.readback import Readback
from titan_lite.training.setup import BuiltTraining
from titan_lite.training.step import StepResult

logger = logging.getLogger(__name__)


class StepMonitor:
    """Counts and times steps, warns about unusual ones, and writes the log records.

    tokens: number of tokens that all ranks have trained on since step 0.
    """

    def __init__(
        self,
        plan: Plan,
        process: Process,
        built: BuiltTraining,
        loader: DataLoader,
        sources: SourceMeter | None,
        state: RunState,
    ) -> None:
        config = plan.config
        self.tokens: int | Tensor = state.tokens
        self.unread_results = UnreadResults(built.train_step.guard, built.parameter_names)
        self.meter = build_meter(
            config, process, plan.run_folder, built.flops, start_step=state.step
        )
        self.forward_times = ForwardTimes(
            built.model.layers.children(),
            process.device,
            compiled=config.compile.covers("model"),
        )
        pp_ranks = [plan.dims.coordinates(rank)["pp"] for rank in range(plan.dims.world_size)]
        self._watch = RecordWatch(process, pp_ranks, start_step=state.step)
        self._plan, self._process, self._built = plan, process, built
        self._balancer = built.train_step.balancer
        self._loader, self._sources = loader, sources

    def count_step(self, step: int, result: StepResult, *, should_log: bool) -> None:
        """Counts every step and reads its result; `log` writes the record of a logged step.

        should_log: the step is logged, so its result is read at once. Otherwise a GPU's result is
        read one step late, so that the GPU has work while the host waits.
        """
        tokens: int | Tensor = self._plan.global_batch_size * self._plan.config.training.seq_len
        if self._built.objective.has_padding:
            # A tensor on the device, which the host does not wait for.
            tokens = result.counts.num_tokens
        self.tokens += tokens
        self.meter.add(tokens=tokens, samples=self._plan.global_batch_size)
        if self._sources is not None:
            self._sources.add(result.counts.source_labelled)
        self.unread_results.add(step, result)
        self.unread_results.read(keep=int(self._process.device.type == "cuda" and not should_log))

    def log(self, step: int, result: StepResult, lr: float, extra: dict[str, float]) -> Record:
        """Writes the record of a step, with `extra` metrics, and returns it; collective."""
        guard, objective = self._built.train_step.guard, self._built.objective
        extra = extra | guard.metrics() | self._data_metrics(result)
        extra |= objective.metrics(result.loss, result.sums, result.counts.num_pairs)
        if self._balancer is not None:
            extra |= self._balancer.metrics()
        waited = self.meter.data_wait
        record = self.meter.log(
            step,
            loss=result.loss,
            grad_norm=result.grad_norm,
            lr=lr,
            tokens_seen=int(self.tokens),
            extra=extra,
        )
        guard.check(step, record["grad_norm"])
        self._watch.look(record, waited, self.forward_times.seconds() * self._plan.micro_steps)
        return record

    def _data_metrics(self, result: StepResult) -> dict[str, float]:
        """Returns metrics of the data that was read; collective."""
        metrics: dict[str, float] = {}
        if self._plan.config.data.on_bad_document != "raise":
            # Data-parallel ranks can read the same stream; the one that is furthest has skipped the
            # most documents.
            counts = torch.tensor(self._loader.num_skipped(), device=self._process.device)
            metrics["skipped_documents"] = all_reduce(counts, "max").sum().item()
        if self._sources is not None:
            assert result.source_losses is not None
            labelled = result.counts.source_labelled
            metrics |= self._sources.metrics(result.source_losses, labelled, self._loader.epochs())
        return metrics


class UnreadResults:
    """Queue of step results that the host has not read yet.

    is_stopping becomes True once a result shows that a rank received a stop signal. All ranks read
    after the same steps, so they take the same decisions.
    """

    def __init__(self, guard: NonFiniteGuard, parameter_names: Sequence[str]) -> None:
        """parameter_names: of the whole model, in its order."""
        self.is_stopping = False
        self._guard = guard
        self._parameter_names = parameter_names
        self._unread: deque[tuple[int, Readback]] = deque()

    def add(self, step: int, result: StepResult) -> None:
        """Starts copying a step's result to the host."""
        outcome = (result.is_finite, result.counts.num_stopping, result.loss, result.grad_norm)
        numbers = [number.to(result.loss.device, torch.float32) for number in outcome]
        self._unread.append((step, Readback(torch.stack(numbers))))

    def read(self, keep: int = 0) -> None:
        """Reads all results except the last `keep`.

        NonFiniteError if training.nonfinite = "stop" and a loss or gradient norm is NaN or Inf.
        """
        while len(self._unread) > keep:
            step, readback = self._unread.popleft()
            is_finite, num_stopping, loss, grad_norm = readback.read()
            self.is_stopping |= num_stopping > 0
            if is_finite or self._guard.mode == "rescale":
                continue
            numbers = f"the loss of step {step} is {loss:g}, its gradient norm {grad_norm:g}"
            if self._guard.mode == "stop":
                raise NonFiniteError(f"{numbers}. {self._list_bad_gradients()}")
            if dist.get_rank() == 0:
                logger.warning("Skipped a step: %s", numbers)

    def _list_bad_gradients(self) -> str:
        """Returns a sentence with the parameters that have non-finite gradients; collective."""
        mine = {name.replace(CHECKPOINT_PREFIX, "") for name in self._guard.bad_gradients()}
        by_rank: list[set[str]] = [set()] * dist.get_world_size()
        dist.all_gather_object(by_rank, mine)
        bad = [name for name in self._parameter_names if any(name in names for names in by_rank)]
        if not bad:
            return "All gradients are finite; the step was not applied"
        first, last = (
            f"{name} (rank {next(r for r, names in enumerate(by_rank) if name in names)})"
            for name in (bad[-1], bad[0])
        )
        return (
            f"Non-finite gradients in {len(bad)} of {len(self._parameter_names)} parameters. First "
            f"in backward order: {first}; last: {last}. The step was not applied"
        )
