"""Searches the legal layouts of a job on a number of devices for the fastest that fit."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from types import SimpleNamespace
from typing import Any

from titan_lite.config.dims import EXPERTS, ParallelDims
from titan_lite.config.schema import Config, Parallel, with_values
from titan_lite.models.args import DecoderArgs, MoEArgs
from titan_lite.models.plan import Plan
from titan_lite.planner.cluster import Cluster
from titan_lite.planner.memory import least, peak, room
from titan_lite.planner.read import is_legal, read_job
from titan_lite.planner.step_time import Step, StepModel

Values = dict[str, object]
Candidate = tuple[Values, Any]
"""The keys of a layout, and the sections of a configuration that has them."""
MODES = ("none", "selective_op", "full")
MICRO_BATCHES = (1, 2, 3, 4, 5, 6, 7, 8)
STAGES_PER_RANK = (2, 3, 4)
# Layouts whose steps differ by less than this share count as equally fast: the simpler is better.
TIE = 0.02


@dataclass(frozen=True)
class Layout:
    """A legal layout that fits: its keys, its predicted step, and its peak memory in bytes."""

    values: Values
    step: Step
    memory: float

    @property
    def order(self) -> tuple[int, int, float]:
        """Sort key: by time; of layouts that are about equally fast, the simpler first."""
        job = self.step.job
        axes = sum(degree > 1 for degree in (job.tp, job.cp, job.ep, job.pp, job.dp_replicate))
        extras = axes + (job.recompute != "none") + job.syncs_last
        return math.floor(math.log(self.step.seconds) / TIE), extras, self.step.seconds


@dataclass(frozen=True)
class SearchResult:
    """Layouts that fit, best first; numbers of legal layouts, fitting or not, and of all tried."""

    layouts: list[Layout]
    legal: int
    tried: int

    def best(self, count: int) -> list[Layout]:
        """The best layout of each of the `count` best kinds."""
        kinds: dict[object, Layout] = {}
        for layout in self.layouts:
            job = layout.step.job
            mesh = job.tp, job.cp, job.ep, job.pp, job.dp_replicate > 1
            kinds.setdefault((mesh, job.stages_per_rank), layout)
        return list(kinds.values())[:count]


def search(
    plan: Plan, parallel: Parallel, world_size: int, samples: int, cluster: Cluster
) -> SearchResult:
    """Predicts every legal layout. samples: per step, equal in all layouts."""
    layouts, legal, tried, args = [], 0, 0, plan.args
    model: StepModel | None = None
    config = plan.config.model_copy(update={"parallel": parallel})
    experts = args.num_experts if isinstance(args, MoEArgs) else 1
    for dims, rows in candidates(config, world_size, samples, cluster, experts):
        tried += sum(map(len, rows))
        allowed = legal_of(rows, dims, args)
        legal += len(allowed)
        for values, config in allowed:
            job = read_job(replace(plan, config=config, dims=dims))
            limit = room(job) * cluster.memory or math.inf
            if least(job) > limit:
                # As many shards as in the others.
                break
            if (need := peak(job).bytes) <= limit:
                model = model or StepModel(cluster, job)
                layouts.append(Layout(values, model.predict(job), need))
    return SearchResult(sorted(layouts, key=lambda layout: layout.order), legal, tried)


def legal_of(rows: list[list[Candidate]], dims: ParallelDims, args: DecoderArgs) -> list[Candidate]:
    """Returns those that break no rule.

    No rule is between micro-batch and recomputation, so checking a row and a column is enough.
    """
    for row in rows:
        modes = [number for number, (_, config) in enumerate(row) if is_legal(config, dims, args)]
        if modes:
            sizes = [row for row in rows if is_legal(row[modes[0]][1], dims, args)]
            return [row[number] for row in sizes for number in modes]
    return []


def candidates(
    config: Config, world_size: int, samples: int, cluster: Cluster, experts: int = 1
) -> Iterator[tuple[ParallelDims, list[list[Candidate]]]]:
    """Yields every layout, legal or not, with its changed keys.

    Degrees, micro-batch, recomputation, resharding, gradient synchronisation and stages vary. Those
    of one mesh and schedule come together, in a row for each micro-batch.
    """
    local, total = "training.local_batch_size", "training.global_batch_size"
    modes = dict.fromkeys((config.activation_checkpoint.mode, *MODES))
    trainings, checkpoints = (
        [(values, {name: getattr(with_values(config, values), name)}) for values in choices]
        for name, choices in (
            ("training", [{local: size, total: samples} for size in MICRO_BATCHES]),
            ("activation_checkpoint", [{"activation_checkpoint.mode": mode} for mode in modes]),
        )
    )
    for keys, parallel, dims in layouts_of(config.parallel, world_size, cluster, experts):
        fixed = dict(config) | {"parallel": parallel}
        # Rules and planner only read attributes, and a validated Config takes long to build.
        yield (
            dims,
            [
                [
                    (keys | size | mode, SimpleNamespace(**(fixed | training | checkpoint)))
                    for mode, checkpoint in checkpoints
                ]
                for size, training in trainings
            ],
        )


def layouts_of(
    parallel: Parallel, world_size: int, cluster: Cluster, experts: int
) -> Iterator[tuple[Values, Parallel, ParallelDims]]:
    """Yields [parallel] sections for a world size; tensor parallel stays within a node."""
    for tp, pp, cp, shard in itertools.product(divisors(world_size), repeat=4):
        replicas, remainder = divmod(world_size, tp * pp * cp * shard)
        if remainder or tp > cluster.gpus_per_node:
            continue
        for ep in divisors(experts):
            dims = ParallelDims(pp=pp, dp_replicate=replicas, dp_shard=shard, cp=cp, tp=tp, ep=ep)
            if dims.over(EXPERTS) % ep:
                continue
            for choice in _choices(parallel, dims):
                values = asdict(dims) | choice
                if parallel.async_tp and tp == 1:
                    values["async_tp"] = False
                keys = {f"parallel.{key}": value for key, value in values.items()}
                yield keys, parallel.model_copy(update=values), dims


def _choices(parallel: Parallel, dims: ParallelDims) -> Iterator[Values]:
    """Yields schedules of a pipeline; without one, times to free weights and reduce gradients."""
    if dims.pp > 1:
        plain: Values = {"pp_schedule": "1F1B", "reshard_after_forward": "default"}
        if parallel.pp_split == "explicit":
            plain["pp_split"] = "time"
        yield plain
        for stages in STAGES_PER_RANK:
            yield plain | {"pp_schedule": "Interleaved1F1B", "pp_stages_per_rank": stages}
        return
    reshards = ("default", "never") if dims.fsdp > 1 else ("default",)
    syncs = ("every_micro_batch", "last_micro_batch")
    for reshard, sync in itertools.product(reshards, syncs):
        yield {"reshard_after_forward": reshard, "gradient_sync": sync}


def divisors(number: int) -> list[int]:
    """All divisors of a number, in ascending order."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})
