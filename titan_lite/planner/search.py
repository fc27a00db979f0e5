"""Searches the legal layouts of a job on a number of devices for the fastest that fit."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import cast

from titan_lite.config.dims import ParallelDims
from titan_lite.config.problems import SettingError
from titan_lite.config.schema import Config, Parallel, with_values
from titan_lite.models.args import DecoderArgs, MoEArgs
from titan_lite.models.family import Family
from titan_lite.planner.cluster import Cluster
from titan_lite.planner.job import Job
from titan_lite.planner.memory import peak, room
from titan_lite.planner.read import is_legal, read_job
from titan_lite.planner.step_time import Step, StepModel

MODES = ("none", "selective_op", "full")
MICRO_BATCHES = (1, 2, 3, 4, 5, 6, 7, 8)
STAGES_PER_RANK = (2, 3, 4)
# Layouts whose steps differ by less than this share count as equally fast: the simpler is better.
TIE = 0.02


@dataclass(frozen=True)
class Layout:
    """A legal layout that fits: its keys, its predicted step, and its peak memory in bytes."""

    values: dict[str, object]
    job: Job
    step: Step
    memory: float

    @property
    def kind(self) -> tuple[object, ...]:
        """The kind of a layout; only the best of each kind is shown."""
        job = self.job
        return job.tp, job.cp, job.ep, job.pp, job.stages_per_rank, job.dp_replicate > 1

    @property
    def order(self) -> tuple[int, int, float]:
        """Sort key: by time; of layouts that are about equally fast, the simpler first."""
        job = self.job
        axes = sum(degree > 1 for degree in (job.tp, job.cp, job.ep, job.pp, job.dp_replicate))
        extras = axes + (job.recompute != "none") + job.syncs_last
        seconds = self.step.seconds
        return math.floor(math.log(seconds) / TIE), extras, seconds


@dataclass(frozen=True)
class SearchResult:
    """Layouts that fit, best first; numbers of legal layouts, fitting or not, and of all tried."""

    layouts: list[Layout]
    legal: int
    tried: int

    def best(self, count: int) -> list[Layout]:
        """The best layout of each of the `count` best kinds."""
        kinds: dict[tuple[object, ...], Layout] = {}
        for layout in self.layouts:
            kinds.setdefault(layout.kind, layout)
        return list(kinds.values())[:count]


def search(
    config: Config,
    world_size: int,
    samples: int,
    family: Family,
    args: DecoderArgs,
    cluster: Cluster,
) -> SearchResult:
    """Predicts every legal layout. samples: per step, equal in all layouts."""
    layouts, legal, tried = [], 0, 0
    model: StepModel | None = None
    experts = args.num_experts if isinstance(args, MoEArgs) else 1
    for values, candidate, dims in candidates(config, world_size, samples, cluster, experts):
        tried += 1
        if not is_legal(candidate, dims, args):
            continue
        legal += 1
        job = read_job(candidate, dims, family, args)
        need = peak(job).bytes
        if cluster.memory and need > room(job) * cluster.memory:
            continue
        model = model or StepModel(cluster, job)
        layouts.append(Layout(values, job, model.predict(job), need))
    return SearchResult(sorted(layouts, key=lambda layout: layout.order), legal, tried)


def candidates(
    config: Config, world_size: int, samples: int, cluster: Cluster, experts: int = 1
) -> Iterator[tuple[dict[str, object], Config, ParallelDims]]:
    """Yields the changed keys, configuration and dims of every layout, legal or not.

    Degrees, micro-batch, recomputation, resharding, gradient synchronisation and stages vary.
    """
    local, total = "training.local_batch_size", "training.global_batch_size"
    batches = [{local: size, total: samples} for size in MICRO_BATCHES]
    trainings = [(values, with_values(config, values).training) for values in batches]
    names = dict.fromkeys((config.activation_checkpoint.mode, *MODES))
    modes = [{"activation_checkpoint.mode": name} for name in names]
    checkpoints = [(mode, with_values(config, mode).activation_checkpoint) for mode in modes]
    sections = {name: getattr(config, name) for name in type(config).model_fields}
    for keys, parallel, dims in layouts_of(config.parallel, world_size, cluster, experts):
        for (batch, training), (mode, checkpoint) in itertools.product(trainings, checkpoints):
            changed = sections | {
                "parallel": parallel,
                "training": training,
                "activation_checkpoint": checkpoint,
            }
            # Rules and planner only read attributes, and a validated Config takes long to build.
            yield keys | batch | mode, cast(Config, SimpleNamespace(**changed)), dims


def layouts_of(
    parallel: Parallel, world_size: int, cluster: Cluster, experts: int
) -> Iterator[tuple[dict[str, object], Parallel, ParallelDims]]:
    """Yields [parallel] sections for a world size; tensor parallel stays within a node."""
    for tp, pp, cp, shard in itertools.product(divisors(world_size), repeat=4):
        replicas, remainder = divmod(world_size, tp * pp * cp * shard)
        if remainder or tp > cluster.gpus_per_node:
            continue
        for ep in divisors(experts):
            axes = {"pp": pp, "dp_replicate": replicas, "dp_shard": shard, "cp": cp, "tp": tp}
            try:
                section = parallel.model_copy(update=axes | {"ep": ep})
                dims = ParallelDims.resolve(section, world_size)
            except SettingError:
                continue
            for choice in _choices(parallel, dims):
                values = asdict(dims) | choice
                if parallel.async_tp and tp == 1:
                    values["async_tp"] = False
                keys = {f"parallel.{key}": value for key, value in values.items()}
                yield keys, parallel.model_copy(update=values), dims


def _choices(parallel: Parallel, dims: ParallelDims) -> Iterator[dict[str, object]]:
    """Yields schedules of a pipeline; without one, times to free weights and reduce gradients."""
    if dims.pp > 1:
        plain: dict[str, object] = {"pp_schedule": "1F1B", "reshard_after_forward": "default"}
        if parallel.pp_split == "explicit":
            plain["pp_split"] = "time"
        yield plain
        for stages in STAGES_PER_RANK:
            yield plain | {"pp_schedule": "Interleaved1F1B", "pp_stages_per_rank": stages}
        return
    reshards = ("default", "never") if dims.fsdp > 1 else ("default",)
    for reshard in reshards:
        for sync in ("every_micro_batch", "last_micro_batch"):
            yield {"reshard_after_forward": reshard, "gradient_sync": sync}


def divisors(number: int) -> list[int]:
    """All divisors of a number, in ascending order."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})
