"""Seconds of one optimizer step, by what they are spent on."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from titan_lite.planner.cluster import Cluster
from titan_lite.planner.counts import (
    attention_matrices,
    block_matrices,
    num_block_params,
    num_experts,
    num_params,
)
from titan_lite.planner.job import Job
from titan_lite.planner.kernels import Rates, num_tensors

PARTS = (
    "matmul",
    "attention",
    "elementwise",
    "head",
    "optimizer",
    "fsdp",
    "tp",
    "cp",
    "pp",
    "bubble",
    "stragglers",
)
"""What the seconds of a step are spent on; communication counts only where nothing hides it."""


class BlockTimes(NamedTuple):
    """One block for one micro-batch, seconds (forward, backward); again: what is recomputed."""

    matmul: tuple[float, float]
    attention: tuple[float, float]
    elementwise: tuple[float, float]
    tp: tuple[float, float]
    cp: tuple[float, float]
    again: tuple[float, float, float, float]

    def seconds(self, way: int, recomputed: float = 0.0) -> float:
        """Sum of all parts; backward with this share of the recomputation."""
        parts = self.matmul, self.attention, self.elementwise, self.tp, self.cp
        return sum(part[way] for part in parts) + (recomputed * sum(self.again) if way else 0)


class StepModel:
    """Predicts the steps of jobs that differ in their layout alone; caches what layouts share."""

    def __init__(self, cluster: Cluster, job: Job) -> None:
        self.rates = Rates(cluster, job)
        self.cluster, self.args = cluster, job.args
        self.k = self.rates.k
        self.block_params = num_block_params(job.args) // job.args.num_layers
        self.params = num_params(job.args)
        self._blocks: dict[tuple[object, ...], BlockTimes] = {}
        self._heads: dict[tuple[object, ...], tuple[float, float]] = {}
        self._rings: dict[tuple[float, int, int], float] = {}

    def inner(self, ranks: int, stride: int) -> int:
        """Ranks of a group in one node, whose ranks are `stride` apart."""
        return max(1, min(ranks, self.cluster.gpus_per_node // stride))

    def ring(self, size: float, ranks: int, stride: int, passes: int = 1) -> float:
        """Seconds of a ring over ranks that are `stride` apart."""
        key = size, ranks, stride
        if (seconds := self._rings.get(key)) is None:
            seconds = self._rings[key] = self.rates.ring(size, ranks, self.inner(ranks, stride))
        return passes * seconds

    def block(self, job: Job) -> BlockTimes:
        """One block of the job."""
        key = (job.tp, job.cp, job.micro_batch, job.recompute, job.float8, job.sequence_parallel,
               job.async_tp, job.cp_method, job.width, job.kernels)  # fmt: skip
        if (cost := self._blocks.get(key)) is None:
            cost = self._blocks[key] = self._block(job)
        return cost

    def _block(self, job: Job) -> BlockTimes:
        rates, args, t, M = self.rates, self.args, job.tp, job.local_tokens
        float8 = job.float8 != "none"
        gated = args.ffn == "swiglu"

        def linear(K: float, N: float, experts: int = 1) -> tuple[float, float]:
            return rates.linear(M * experts, K, N, float8=float8)

        experts = num_experts(args)
        projections = [linear(*sides) for sides in attention_matrices(args, t)]
        up = linear(args.dim, args.ffn_dim / t, experts)
        down = linear(args.ffn_dim / t, args.dim, experts)
        forward, backward = (
            sum(projection[way] for projection in projections)
            + (2 if gated else 1) * up[way]
            + down[way]
            for way in (0, 1)
        )
        attention, elementwise = rates.attention(job), rates.elementwise(job)
        size = 2 * rates.scale * M * args.dim
        gather = self.ring(size * (0.5 if float8 else 1), t, 1)
        scatter = self.ring(size, t, 1)
        exposed = 1 - self.k["async_tp"] if job.async_tp else 1.0
        # float8's scales: a number each, of the inputs that are shared.
        scales = 6 * self.ring(8, t, 1, 2) if float8 else 0.0
        tp = exposed * 2 * (gather + scatter) + scales
        cp = self._cp(job, attention)
        match job.recompute:
            case "full":
                kept = down[0] if job.early_stop else 0.0
                again_tp = exposed * (2 * gather + scatter) + scales
                again = (forward - kept, attention[0], elementwise[0], again_tp + cp[0])
            case "selective_op":
                again_tp = exposed * 2 * gather
                again_matmuls = sum(forward for forward, _ in projections[::2])
                again = (again_matmuls + (up[0] if gated else 0), 0.0, elementwise[0], again_tp)
            case "attention_core":
                again = (0.0, attention[0], 0.0, 0.0)
            case "norms":
                again = (0.0, 0.0, rates.norms(job), 0.0)
            case _:
                again = (0.0, 0.0, 0.0, 0.0)
        return BlockTimes((forward, backward), attention, elementwise, (tp, tp), cp, again)

    def _cp(self, job: Job, attention: tuple[float, float]) -> tuple[float, float]:
        """Exposed exchange of keys and values in one block, forward and backward."""
        c, args = job.cp, self.args
        if c == 1:
            return 0.0, 0.0
        stride, width = job.tp, 2 * self.rates.scale
        kv = 2 * job.local_tokens * args.kv_dim / job.tp * width
        if job.cp_method == "ulysses":
            moved = kv + 2 * job.local_tokens * args.attention_dim / job.tp * width
            # Each rank sends (c - 1) / c of what it has: a ring's share of it, once.
            each = self.ring(moved, c, stride)
            return each, each
        if job.cp_method == "all_gather":
            each = self.ring(kv * c, c, stride)
            return each, 2 * each
        inner = self.inner(c, stride)
        hop = self.k["node_hop_us" if c > inner else "hop_us"] * 1e-6
        step = (kv * args.num_heads / args.num_kv_heads) / self.rates.bandwidth(c, inner) + hop
        ring = (c - 1) * step
        return max(0.0, ring - attention[0]), max(0.0, 3 * ring - attention[1])

    def head(self, job: Job) -> tuple[float, float]:
        """Output projection and loss of a micro-batch, and their tensor-parallel collectives."""
        key = job.tp, job.cp, job.micro_batch, job.sequence_parallel, job.loss_bytes, job.width
        if (cost := self._heads.get(key)) is None:
            tokens = job.local_tokens * job.head_token_fraction
            rows = self.args.padded_vocab_size / job.tp
            matmul = sum(self.rates.linear(tokens, self.args.dim, rows))
            loss = self.rates.loss(job, tokens, rows)
            size = 2 * self.rates.scale * job.local_tokens * self.args.dim
            cost = self._heads[key] = matmul + loss, 4 * self.ring(size, job.tp, 1)
        return cost

    def predict(self, job: Job) -> "Step":
        """The job's step."""
        block, head = self.block(job), self.head(job)
        parts = dict.fromkeys(PARTS, 0.0)
        m = job.micro_steps
        self._compute(job, block, head, m, parts)
        if job.pp > 1:
            self._pipeline(job, block, head, parts)
        elif job.sharding == "fsdp":
            self._fsdp(job, block, parts)
        else:
            self._replicated(job, block, parts)
        local = self.params / (job.tp * job.pp)
        held = job.shards if job.sharding != "ddp" else 1
        parts["optimizer"] = self.rates.optimizer(job, local / held)
        if job.ns_steps:
            parts["optimizer"] += self._muon(job, local / held)
        if m > 1 and (job.syncs_last or job.sharding != "fsdp" or job.pp > 1):
            parts["optimizer"] += m * job.accumulate_bytes * local / self.rates.hbm
        doublings = math.log2(max(1, job.gpus / self.cluster.gpus_per_node))
        total = sum(parts.values())
        parts["stragglers"] = doublings * (
            self.k["straggler"] * total + self.k["straggler_ms"] * 1e-3
        )
        factor = self.cluster.measured.get(f"step/{job.kernels}", self.k["step"])
        return Step(job, self.cluster, {name: factor * part for name, part in parts.items()})

    def _muon(self, job: Job, shard: float) -> float:
        """Newton-Schulz on the owners of the matrices, to which shards travel, and back."""
        owners, matmul = job.gpus // job.pp, self.rates.matmul
        each = [
            job.ns_steps * (matmul(m, n, m) + matmul(m, m, m) + matmul(m, m, n))
            for m, n in block_matrices(job.args)
        ]
        busiest = max(max(each), job.args.num_layers / job.gpus * sum(each))
        return busiest + 2 * self.ring(job.width * shard, owners, 1)

    def _slowest(self, job: Job, block: BlockTimes, head: float) -> tuple[int, int, bool]:
        """The slowest pipeline rank: its blocks, recomputed blocks, and whether it has the head."""
        best: tuple[float, tuple[int, int, bool]] = (-1.0, (0, 0, False))
        again, both = sum(block.again), block.seconds(0) + block.seconds(1)
        for stages in rank_stages(job):
            count = sum(job.blocks[s] for s in stages)
            recomputed = sum(job.recomputed[s] for s in stages)
            has_head = len(job.blocks) - 1 in stages
            seconds = count * both + recomputed * again + has_head * head
            best = max(best, (seconds, (count, recomputed, has_head)))
        return best[1]

    def _compute(
        self,
        job: Job,
        block: BlockTimes,
        head: tuple[float, float],
        m: int,
        parts: dict[str, float],
    ) -> None:
        count, recomputed, has_head = self._slowest(job, block, head[0])
        again = block.again
        parts["matmul"] = m * (count * sum(block.matmul) + recomputed * again[0])
        parts["attention"] = m * (count * sum(block.attention) + recomputed * again[1])
        parts["elementwise"] = m * (count * sum(block.elementwise) + recomputed * again[2])
        parts["tp"] = m * (count * sum(block.tp) + recomputed * again[3] + has_head * head[1])
        parts["cp"] = m * count * sum(block.cp)
        parts["head"] = m * has_head * head[0]

    @cached_property
    def _ends(self) -> tuple[int, int]:
        """Parameters of the embeddings' and of the head's unit."""
        args = self.args
        table = args.padded_vocab_size * args.dim
        return (0 if args.tied_head else table), table

    def _exposed(self, network: float, compute: float) -> float:
        """Slowdown of the compute that hides communication."""
        return max(network, compute + self.k["interference"] * network) - compute

    def _units(self, job: Job, params: float) -> tuple[float, float]:
        """Seconds to gather and to reduce parameters over the FSDP ranks (and replicas)."""
        local, stride = params / job.tp, job.tp
        scale = self.rates.scale
        gather = self.ring(local * (1 if job.float8_gather else 2 * scale), job.shards, stride)
        reduce = self.ring(local * job.reduce_bytes, job.shards, stride)
        if job.replicas > 1:
            size = local * job.reduce_bytes / job.shards
            reduce += self.ring(size, job.replicas, stride * job.shards, 2)
        return gather, reduce

    def _fsdp(self, job: Job, block: BlockTimes, parts: dict[str, float]) -> None:
        gather, reduce = self._units(job, self.block_params)
        first, last = (self._units(job, size) for size in self._ends)
        layers, m = self.args.num_layers, job.micro_steps
        share = job.recomputed[0] / layers
        forward, backward = block.seconds(0), block.seconds(1, share)
        if job.shards * job.replicas == 1:
            return
        once = job.keeps_gathered and job.syncs_last
        total = 0.0
        for micro in {0, m - 1, 1 % m}:
            times = 1 if micro in (0, m - 1) else m - 2
            gathers = not once or micro == 0
            reduces = not job.syncs_last or micro == m - 1
            in_forward = gather if gathers else 0.0
            in_backward = (0.0 if job.keeps_gathered else gather) + (reduce if reduces else 0.0)
            exposed = self._exposed(in_forward, forward) + self._exposed(in_backward, backward)
            ends = (first[0] + gather if gathers else 0.0) + (
                first[1] + last[1] * self.args.tied_head + reduce if reduces else 0.0
            )
            total += times * (layers * exposed + ends)
        parts["fsdp"] = total

    def _replicated(self, job: Job, block: BlockTimes, parts: dict[str, float]) -> None:
        """Sharding whose parameters are whole on each rank: DDP, ZeRO-1 and -2, InternLM's."""
        ranks, stride = job.shards * job.replicas, job.tp
        if ranks == 1:
            return
        local = self.params / job.tp
        size = local * job.reduce_bytes
        backward = (
            0.9 * self.args.num_layers * block.seconds(1, job.recomputed[0] / self.args.num_layers)
        )
        reduces = job.micro_steps if job.sharding == "zero2" else 1
        passes = 1 if job.sharding in ("zero1", "zero2") else 2
        exposed = reduces * self._exposed(self.ring(size, ranks, stride, passes), backward)
        values = 2 * self.rates.scale * local
        if job.sharding in ("zero1", "zero2", "hybrid_zero"):
            exposed += self.ring(values, job.shards, stride)
        elif job.sharding == "greedy_zero1":
            # Whole tensors have owners, which send them along a chain of all ranks in turn.
            inner = self.inner(ranks, stride)
            nodes = max(1, ranks // inner)
            hops = (ranks - nodes) * self.k["hop_us"] + nodes * self.k["node_hop_us"]
            owners = min(ranks, num_tensors(self.args))
            exposed += values / self.rates.bandwidth(ranks, inner) + owners * hops * 1e-6
        parts["fsdp"] = exposed

    def _pipeline(
        self, job: Job, block: BlockTimes, head: tuple[float, float], parts: dict[str, float]
    ) -> None:
        m, passes = job.micro_steps, job.micro_steps // job.pipelined
        rank = sum(parts.values()) / m
        size = 2 * self.rates.scale * job.local_tokens * self.args.dim / job.tp
        # Neighbours in the pipeline are in other nodes where the rest of the mesh fills one.
        far = job.tp * job.shards * job.replicas >= self.cluster.gpus_per_node
        share = self.cluster.gpus_per_node
        wide = self.rates.outer / share if far else self.rates.inner
        hop = self.k["node_hop_us" if far else "hop_us"] * 1e-6
        parts["pp"] = m * 2 * job.stages_per_rank * (size / min(wide, self.rates.inner) + hop)
        # The gradients of weights fill what would be idle where they are computed apart.
        idle = 1 / 3 if job.splits_backward else 1.0
        parts["bubble"] = passes * (job.pp - 1) / job.stages_per_rank * idle * rank
        params = self.params / job.pp
        if job.shards * job.replicas > 1:
            if job.sharding == "fsdp":
                parts["fsdp"] = passes * 0.5 * sum(self._units(job, params))
            else:
                stride, ranks = job.tp, job.shards * job.replicas
                reduce = self.ring(params / job.tp * job.reduce_bytes, ranks, stride, 2)
                parts["fsdp"] = 0.5 * reduce


def rank_stages(job: Job) -> list[tuple[int, ...]]:
    """The stages of each pipeline rank."""
    p, v = job.pp, job.stages_per_rank
    if job.is_v:
        return [(rank, 2 * p - 1 - rank) for rank in range(p)]
    return [tuple(rank + p * number for number in range(v)) for rank in range(p)]


@dataclass(frozen=True)
class Step:
    """Seconds of a step by PARTS, on a cluster."""

    job: Job
    cluster: Cluster
    parts: dict[str, float]

    @property
    def seconds(self) -> float:
        """Seconds of the step."""
        return sum(self.parts.values())

    @property
    def wps(self) -> float:
        """Tokens per second and device."""
        return self.job.tokens / self.job.gpus / self.seconds

    @property
    def watts(self) -> float:
        """Mean power of a device."""
        parts, k = self.parts, self.cluster.constants()
        busy = parts["matmul"] + parts["attention"] + 0.5 * parts["head"]
        memory = parts["elementwise"] + parts["optimizer"] + 0.5 * parts["head"]
        waiting = self.seconds - busy - memory
        share = busy + k["memory_watts"] * memory + k["waiting_watts"] * waiting
        limit = self.cluster.limit_w
        idle = k["idle_watts"] * limit
        return idle + (limit - idle) * share / self.seconds
