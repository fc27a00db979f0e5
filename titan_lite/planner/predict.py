"""Predicts a run's memory, time, cost and energy on a cluster, and finds settings that help."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from titan_lite.config.dims import ParallelDims
from titan_lite.config.schema import with_values
from titan_lite.models.args import DecoderArgs
from titan_lite.models.plan import Plan
from titan_lite.planner import counts
from titan_lite.planner.cluster import Cluster
from titan_lite.planner.hardware import Device
from titan_lite.planner.interval import Interval, interval
from titan_lite.planner.job import Job
from titan_lite.planner.memory import Memory, memory, peak, room
from titan_lite.planner.read import is_legal, read_job
from titan_lite.planner.step_time import Step, StepModel

HOURS, DAYS = 3600.0, 86_400.0
Values = dict[str, Any]


@dataclass(frozen=True)
class Prediction:
    """A job on a cluster. memory: peak of each place in the pipeline. tokens: of the whole run."""

    step: Step
    memory: tuple[Memory, ...]
    tokens: float

    @property
    def peak(self) -> Memory:
        """The largest peak of all places in the pipeline."""
        return max(self.memory, key=lambda place: place.bytes)

    @property
    def share(self) -> float:
        """Share of the device's memory at the peak."""
        return self.peak.bytes / self.step.cluster.memory if self.step.cluster.memory else 0.0

    @property
    def fits(self) -> bool:
        """True if the job fits with a margin."""
        return self.share <= room(self.step.job)

    @cached_property
    def interval(self) -> Interval:
        """80 % interval of the step's seconds."""
        return interval(self.step)

    @property
    def tflops(self) -> float:
        """Model TFLOP/s of a device, without recomputation."""
        return self.step.wps * model_flops(self.step.job.args, self.step.job.span) / 1e12

    @property
    def mfu(self) -> float:
        """Model FLOPs utilization: share of the peak in bfloat16, or in float32 for such a job."""
        number_format = "bfloat16" if self.step.job.width == 2 else "float32"
        return self.tflops * 1e12 / self.step.cluster.peak(number_format)  # type: ignore[arg-type]

    @property
    def seconds(self) -> float:
        """Seconds of the whole run, without pauses."""
        return self.tokens / self.step.job.tokens * self.step.seconds

    @property
    def gpu_hours(self) -> float:
        """GPU-hours of the whole run."""
        return self.seconds * self.step.job.world_size / HOURS

    @property
    def cost(self) -> float:
        """Cost of the whole run at the cluster's price."""
        return self.gpu_hours * self.step.cluster.price_per_gpu_hour

    @property
    def device_mwh(self) -> float:
        """Energy of the devices alone."""
        return self.step.watts * self.gpu_hours / 1e6

    @property
    def total_mwh(self) -> float:
        """Energy of devices and hosts, at the data centre's power usage effectiveness."""
        cluster = self.step.cluster
        hosts = cluster.host_watts / cluster.gpus_per_node * self.gpu_hours / 1e6
        return (self.device_mwh + hosts) * cluster.pue


def model_flops(args: DecoderArgs, span: int) -> int:
    """FLOPs per token, with full attention and without recomputation."""
    multiplied = counts.num_params(args) - counts.num_unused_params(args)
    return counts.flops_per_token(args, span, multiplied, counts.num_block_params(args)).model


def predict(job: Job, cluster: Cluster, tokens: float) -> Prediction:
    """Predicts one job."""
    step = StepModel(cluster, job).predict(job)
    return Prediction(step, tuple(memory(job)), tokens)


Advice = tuple[Values, Prediction]
"""Settings that would help, and the job's prediction with them."""


def advice(
    plan: Plan, cluster: Cluster, *, count: int = 2, below: float | None = None
) -> list[Advice]:
    """Returns the `count` changes that fit and make the step fastest.

    If the run does not fit, or `below` is set, only changes that need less memory are considered:
    less than `below` bytes, or than now.
    """
    now = predict(read_job(plan), cluster, 1.0)
    better = []
    samples = {"training.global_batch_size": plan.global_batch_size}
    for values in _changes(plan, cluster, now.step.job):
        config = with_values(plan.config, values | samples)
        try:
            dims = ParallelDims.resolve(config.parallel, plan.dims.world_size)
        except ValueError:
            continue
        if not is_legal(config, dims, plan.args):
            continue
        change = predict(read_job(replace(plan, config=config, dims=dims)), cluster, 1.0)
        if below is not None or not now.fits:
            helps = change.peak.bytes < (below or now.peak.bytes)
        else:
            helps = change.step.seconds < 0.99 * now.step.seconds
        if change.fits and helps:
            better.append((values, change))
    return sorted(better, key=lambda one: one[1].step.seconds)[:count]


def fitting_settings(plan: Plan, device: Device) -> list[str]:
    """Describes changes with which a run would fit that does not, the fastest first."""
    cluster = Cluster(name=device.name, device=device)
    now = peak(read_job(plan))
    better = advice(plan, cluster, count=3, below=now.bytes)
    return [
        f"{' '.join(setting(*item) for item in values.items())}: "
        f"{change.peak.bytes / 2**30:.1f} of {device.memory_gb:g} GiB, predicted"
        for values, change in better
    ]


def setting(key: str, value: object) -> str:
    """Formats a key and its value as an override."""
    return f"--{key}={value}".lower() if isinstance(value, bool) else f"--{key}={value}"


def _changes(plan: Plan, cluster: Cluster, job: Job) -> Iterator[Values]:
    """Yields single changes; only float8 affects the trained model beyond rounding."""
    config, dims, parallel = plan.config, plan.dims, plan.config.parallel
    if not config.compile.enable:
        yield {"compile.enable": True}
    if config.float8.recipe == "none" and cluster.device.fp8_tflops and config.compile.enable:
        yield {"float8.recipe": "tensorwise", "float8.fsdp_all_gather": job.fsdp > 1}
    modes = [{"activation_checkpoint.mode": mode} for mode in ("none", "selective_op", "full")]
    modes = [mode for mode in modes if config.activation_checkpoint.mode not in mode.values()]
    yield from modes
    for batch in _scaled(job.micro_batch, (2, 4)):
        size = {"training.local_batch_size": batch}
        yield size
        yield from (size | mode for mode in modes if "none" not in mode.values())
    if dims.tp > 1 and not parallel.async_tp and config.compile.enable:
        yield {"parallel.async_tp": True}
    for reshard in ("always", "never"):
        if dims.pp == 1 and parallel.reshard_after_forward != reshard:
            yield {"parallel.reshard_after_forward": reshard}
    if job.micro_steps > 1:
        other = {"every_micro_batch": "last_micro_batch", "last_micro_batch": "every_micro_batch"}
        yield {"parallel.gradient_sync": other[parallel.gradient_sync]}
    if dims.pp > 1 and parallel.pp_schedule == "1F1B":
        for stages in (2, 3, 4):
            yield {"parallel.pp_schedule": "Interleaved1F1B", "parallel.pp_stages_per_rank": stages}
    for axis in ("tp", "pp", "cp", "ep", "dp_replicate"):
        for degree in _scaled(getattr(dims, axis), (2, 4, 8)):
            yield {f"parallel.{axis}": degree, "parallel.dp_shard": -1}


def _scaled(number: int, factors: tuple[int, ...]) -> list[int]:
    """Multiples of a number, and its quotients by 2, 4 and 8."""
    divided = [number // factor for factor in (2, 4, 8) if number % factor == 0]
    return [number * factor for factor in factors] + divided
