"""Speeds, utilisation and memory of a run, measured over windows of whole steps."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from titan_lite.config.schema import Metrics
from titan_lite.config.units import format_duration, format_number
from titan_lite.metrics.device import DeviceMemory, PeakFlops
from titan_lite.metrics.record import METRICS, Record
from titan_lite.metrics.sinks import Sink
from titan_lite.planner.counts import FlopsPerToken

logger = logging.getLogger(__name__)

AllReduce = Callable[[Tensor, str], Tensor]
"""Reduces a tensor over all ranks with the named operation ("max") and returns the result."""


@dataclass
class _Window:
    """The steps since the last log step; seconds are those of the meter's clock.

    joules: the counter at the start, plus the energy of excluded time.
    """

    start: float
    first_step: int
    tokens: int | Tensor = 0
    samples: int = 0
    waited: float = 0.0
    excluded: float = 0.0
    joules: float = 0.0


@dataclass(kw_only=True, eq=False)
class Meter:
    """Measures whole steps between log steps; waits for the device on log steps only.

    A window runs from one log step to the next, less the time inside `excluded`. The first one,
    which holds start-up (first batch, compilation), is marked `warmup` and excluded from the
    summary's averages. Every rank calls `log`; only ranks that write have sinks.
    """

    section: Metrics
    sinks: Sequence[Sink]
    flops: FlopsPerToken
    peak: PeakFlops
    device: torch.device
    num_devices: int
    num_steps: int
    start_step: int = 0
    all_reduce: AllReduce | None = None
    energy: Callable[[], float] | None = None
    clock: Callable[[], float] = time.perf_counter

    def __post_init__(self) -> None:
        self._memory = DeviceMemory(self.device)
        self._start = self.clock()
        self._window = _Window(self._start, self.start_step + 1, joules=self._joules())
        self._first: Record = {}
        self._last: Record = {}
        self._measured_tokens = 0
        self._measured_seconds = 0.0
        self._measured_steps = 0
        self._excluded = 0.0
        self.peak_memory_gib = 0.0
        peak = self.peak
        if peak.tflops is None:
            logger.info("MFU is not measured: %s", peak.source)
        else:
            logger.info("MFU is relative to %.4g TFLOP/s per device: %s", peak.tflops, peak.source)

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Counts the time inside as waiting for data; it stays part of the step."""
        start = self.clock()
        try:
            yield
        finally:
            self._window.waited += self.clock() - start

    @contextlib.contextmanager
    def excluded(self) -> Iterator[None]:
        """Excludes the time in its context (saving, validation) from every speed."""
        if self.device.type != "cpu":
            # Work that is still queued on the device belongs to the time before.
            torch.get_device_module(self.device).synchronize(self.device)
        start, joules = self.clock(), self._joules()
        try:
            yield
        finally:
            seconds = self.clock() - start
            self._window.joules += self._joules() - joules
            self._window.excluded += seconds
            self._excluded += seconds

    def add(self, tokens: int | Tensor, samples: int) -> None:
        """Counts a step's input tokens and samples, of the whole job.

        tokens: a scalar tensor if the number is only known on the device.
        """
        self._window.tokens += tokens
        self._window.samples += samples

    @property
    def data_wait(self) -> float:
        """Seconds that this rank has waited for data since the last log step."""
        return self._window.waited

    @property
    def seconds_per_step(self) -> float | None:
        """Mean over logged steps after the start-up window; None if there are none."""
        return self._measured_seconds / self._measured_steps if self._measured_steps else None

    @property
    def memory_kind(self) -> str:
        """Describes the peak memory: on a CPU it holds more than a run allocates."""
        return "resident in one process" if self.device.type == "cpu" else "active on one device"

    def should_log(self, step: int) -> bool:
        """True for the first and the last step of this process and every `log_freq` steps."""
        return step in (self.start_step + 1, self.num_steps) or step % self.section.log_freq == 0

    def log(
        self,
        step: int,
        *,
        loss: Tensor | float,
        grad_norm: Tensor | float,
        lr: float,
        tokens_seen: int,
        extra: Mapping[str, float] | None = None,
    ) -> Record:
        """Ends the window at `step`, writes its record to the sinks and returns it; collective.

        loss, grad_norm: those of the step, already global. tokens_seen: since step 0.
        """
        # The host waits for the device here, so the clock is read after the step's last kernel.
        record: Record = {
            "step": step,
            "loss": float(loss),
            "grad_norm": float(grad_norm),
            "lr": lr,
            "tokens": tokens_seen,
        }
        now = self.clock()
        joules = self._joules()
        window, self._window = self._window, _Window(now, step + 1, joules=joules)
        seconds = now - window.start - window.excluded
        record |= self._speeds(window, steps=step + 1 - window.first_step, seconds=seconds)
        record |= self._worst_rank(
            {"data_wait": 100 * window.waited / seconds, **self._memory.snapshot()}
        )
        if self.energy is not None:
            record |= self._power(joules - window.joules, int(window.tokens), seconds)
        self._memory.reset_peak()
        for key, value in (extra or {}).items():
            assert key not in record, f"{key} is a metric of the meter's own"
            record[key] = value
        if window.first_step == self.start_step + 1:
            record["warmup"] = True
        else:
            self._measured_tokens += int(window.tokens)
            self._measured_seconds += seconds
            self._measured_steps += step + 1 - window.first_step
        self._first = self._first or record
        self._last = record
        self.peak_memory_gib = max(self.peak_memory_gib, record["memory_gib"])
        for sink in self.sinks:
            sink.write(record)
        return record

    def close(self) -> None:
        """Closes the sinks."""
        for sink in self.sinks:
            sink.close()

    def summary(self) -> str:
        """Five lines: loss, WPS, MFU, memory, wall time; averages leave the start-up window out."""
        not_measured = "not measured: no step was logged after start-up"
        loss = "not measured: no step was logged"
        memory = loss
        if self._first:
            loss = " -> ".join(
                f"{r['loss']:.4f} (step {r['step']})" for r in (self._first, self._last)
            )
            memory = f"{format_number(self.peak_memory_gib, '.2f')} GiB {self.memory_kind}"
        wps_text = mfu = not_measured
        if self._measured_seconds > 0:
            wps = self._measured_tokens / (self._measured_seconds * self.num_devices)
            speed = format_number(wps, ",.0f")
            wps_text = f"{speed} tokens/s per device, devices: {self.num_devices}"
            if self.peak.tflops is not None:
                percent = format_number(self._percent_of_peak(self.flops.model, wps), ".1f")
                mfu = f"{percent}% of {self.peak.tflops:.4g} TFLOP/s ({self.peak.source})"
        if self.peak.tflops is None:
            mfu = f"not measured: {self.peak.source}"
        wall = format_duration(self.clock() - self._start)
        if self._excluded >= 1:
            wall += f", of which checkpoints and validation {format_duration(self._excluded)}"
        lines = {
            "loss": loss,
            "WPS": wps_text,
            "MFU": mfu,
            "peak memory": memory,
            "wall time": wall,
        }
        return "\n".join(f"{label:<11}  {text}" for label, text in lines.items())

    def _speeds(self, window: _Window, *, steps: int, seconds: float) -> Record:
        wps = int(window.tokens) / (seconds * self.num_devices)
        speeds: Record = {
            "wps": wps,
            "samples_per_second": window.samples / seconds,
            "iterations_per_second": steps / seconds,
            "seconds_per_step": seconds / steps,
            "tflops": self.flops.model * wps / 1e12,
        }
        if self.peak.tflops is not None:
            speeds["mfu"] = self._percent_of_peak(self.flops.model, wps)
            speeds["mfu_causal"] = self._percent_of_peak(self.flops.causal, wps)
            if self.flops.hardware is not None:
                speeds["hfu"] = self._percent_of_peak(self.flops.hardware, wps)
        return speeds

    def _joules(self) -> float:
        return self.energy() if self.energy is not None else 0.0

    def _power(self, joules: float, tokens: int, seconds: float) -> Record:
        """Power and energy of all devices, in one collective."""
        total = torch.tensor(joules, dtype=torch.float64, device=self.device)
        if self.all_reduce is not None:
            total = self.all_reduce(total, "sum")
        watts = total.item() / seconds / self.num_devices
        return {"watts": watts, "joules_per_token": total.item() / tokens}

    def _percent_of_peak(self, flops_per_token: float, wps: float) -> float:
        assert self.peak.tflops is not None
        return 100 * flops_per_token * wps / (self.peak.tflops * 1e12)

    def _worst_rank(self, values: Mapping[str, float]) -> Record:
        """The maximum of each value over all ranks, in one collective."""
        assert all(METRICS[key].reduction == "max" for key in values)
        if self.all_reduce is None:
            return dict(values)
        packed = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        return dict(zip(values, self.all_reduce(packed, "max").tolist(), strict=True))
