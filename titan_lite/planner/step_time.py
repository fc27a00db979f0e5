"""Seconds of one optimizer step, as a sum of parts."""

import math
from dataclasses import dataclass
from itertools import zip_longest
from typing import NamedTuple

from titan_lite.config.schedules import SCHEDULES
from titan_lite.models.args import MoEArgs
from titan_lite.planner import counts
from titan_lite.planner.cluster import Cluster
from titan_lite.planner.job import Job
from titan_lite.planner.kernels import Rates
from titan_lite.planner.selective import saves_product, saves_sums

Pair = tuple[float, float]
"""Seconds of forward and of backward."""
Parts = dict[str, float]


class BlockTimes(NamedTuple):
    """Seconds of one block for one micro-batch. again: seconds to recompute each part."""

    matmul: Pair
    attention: Pair
    elementwise: Pair
    tp: Pair
    cp: Pair
    ep: Pair
    again: tuple[float, ...]

    def seconds(self, way: int, recomputed: float = 0.0) -> float:
        """Sum of all parts, forward (way 0) or backward (way 1).

        recomputed: share of the recomputation that backward includes.
        """
        return sum(part[way] for part in self[:-1]) + (recomputed * sum(self.again) if way else 0)


PARTS = *BlockTimes._fields[:-1], "head", "optimizer", "fsdp", "pp", "bubble", "stragglers"
"""Parts of a step's time; communication that computation hides is not counted."""


class StepModel:
    """Predicts steps of jobs that differ only in layout; caches values that layouts share."""

    def __init__(self, cluster: Cluster, job: Job) -> None:
        self.rates = Rates(cluster, job)
        self.cluster, self.args = cluster, job.args
        self.k = self.rates.k
        self.params = counts.num_params(job.args)
        dense, self.experts = counts.block_params(job.args, 0, job.args.num_layers)
        self.block_params = dense / job.args.num_layers, self.experts / job.args.num_layers
        self._blocks: dict[tuple[object, ...], BlockTimes] = {}

    def inner(self, ranks: int, stride: int) -> int:
        """Ranks per node of a group whose ranks are `stride` apart."""
        return max(1, min(ranks, self.cluster.gpus_per_node // stride))

    def ring(self, size: float, ranks: int, stride: int, passes: int = 1) -> float:
        """Seconds of a ring over ranks that are `stride` apart."""
        return passes * self.rates.ring(size, ranks, self.inner(ranks, stride))

    def block(self, job: Job) -> BlockTimes:
        """Times of one block of the job."""
        key = (job.tp, job.cp, job.ep, job.micro_batch, job.recompute, job.saved, job.float8,
               job.width, job.sequence_parallel, job.async_tp, job.cp_method,
               job.kernels)  # fmt: skip
        if (cost := self._blocks.get(key)) is None:
            cost = self._blocks[key] = self._block(job)
        return cost

    def _block(self, job: Job) -> BlockTimes:
        rates, args, t, M = self.rates, self.args, job.tp, job.local_tokens
        float8 = job.float8 != "none"
        _, routed = counts.feed_forwards(args)
        products = [rates.linear(M, K, N, float8=float8) for K, N in counts.block_products(args, t)]
        grouped, ep = self._experts(job, M * routed / t)
        forward, backward = (
            sum(product[way] for product in (*products, *grouped)) for way in (0, 1)
        )
        last = products[-1][0] if job.early_stop and not routed else 0.0
        attention, elementwise = rates.attention(job), rates.elementwise(job)
        size = 2 * rates.scale * M * args.dim
        # Rows of several samples are put in order after a gather, and before a scatter.
        reorder = rates.bytes["copies"] * 2 * size / rates.hbm * (t > 1 and job.sequence_parallel)
        gather = self.ring(size * (0.5 if float8 else 1), t, 1) + reorder * (job.micro_batch > 1)
        scatter = self.ring(size, t, 1) + reorder
        exposed = self.k["tp"] * (1 - self.k["async_tp"] if job.async_tp else 1.0)
        # Scales of float8, one number for each input that tensor-parallel ranks share.
        scales = 6 * self.ring(8, t, 1, 2) if float8 else 0.0
        tp = exposed * 2 * (gather + scatter) + scales
        cp = self._cp(job, attention)
        again: tuple[float, ...] = ()
        match job.recompute:
            case "full":
                again_tp = exposed * (2 * gather + scatter) + scales
                again = (forward - last, attention[0], elementwise[0], again_tp, cp[0], ep[0])
            case "selective_op":
                # Torch stops before the last product, which backward does not need.
                kept = [p[0] for number, p in enumerate(products) if saves_product(job, number)]
                kept += [last] * (not saves_product(job, len(products) - 1))
                kept += [p[0] for p in grouped if "grouped_matmul" in job.saved]
                attends = float("attention" not in job.saved)
                again = (
                    forward - sum(kept),
                    attends * attention[0],
                    elementwise[0],
                    exposed * (2 * gather + (0.0 if saves_sums(job) else scatter)),
                    attends * cp[0],
                    0.0 if "all_to_all" in job.saved else ep[0],
                )
        return BlockTimes((forward, backward), attention, elementwise, (tp, tp), cp, ep, again)

    def _experts(self, job: Job, rows: float) -> tuple[list[Pair], Pair]:
        """Matmuls of a block's experts, with equal loads, and the all-to-all exchange of rows."""
        args = self.args
        if not (isinstance(args, MoEArgs) and args.num_experts):
            return [], (0.0, 0.0)
        groups = args.num_experts // job.ep
        up, down = (
            self.rates.linear(rows / groups, *sides, groups=groups)
            for sides in ((args.dim, args.ffn_dim), (args.ffn_dim, args.dim))
        )
        size = 2 * self.rates.scale * rows * args.dim
        exchange = 2 * self.rates.all_to_all(size, job.ep, self.inner(job.ep, 1))
        return [up, up, down], (exchange, exchange)

    def _cp(self, job: Job, attention: Pair) -> Pair:
        """Exposed exchange of keys and values in one block, forward and backward."""
        c, args = job.cp, self.args
        if c == 1:
            return 0.0, 0.0
        stride, width = job.tp, 2 * self.rates.scale
        kv = 2 * job.local_tokens * args.kv_dim / job.tp * width
        if job.cp_method == "ulysses":
            moved = kv + 2 * job.local_tokens * args.attention_dim / job.tp * width
            # Each rank sends (c - 1) / c of its data, as in one pass of a ring.
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

    def head(self, job: Job) -> Pair:
        """Output projection and loss of a micro-batch, and their tensor-parallel collectives."""
        tokens = job.local_tokens * job.head_token_fraction
        rows = self.args.padded_vocab_size / job.tp
        matmul = sum(self.rates.linear(tokens, self.args.dim, rows))
        size = 2 * self.rates.scale * job.local_tokens * self.args.dim
        return matmul + self.rates.loss(job, tokens, rows), 4 * self.ring(size, job.tp, 1)

    def predict(self, job: Job) -> "Step":
        """Predicts the job's step."""
        block, head = self.block(job), self.head(job)
        parts = dict.fromkeys(PARTS, 0.0)
        m = job.micro_steps
        self._compute(job, block, head, parts)
        if job.pp > 1:
            self._pipeline(job, block, head, parts)
        else:
            self.shard(job, block, parts)
        local = self.params / (job.tp * job.pp)
        held = job.fsdp if job.sharding != "ddp" else 1
        parts["optimizer"] = self.rates.optimizer(local / held)
        if job.ns_steps:
            parts["optimizer"] += self._muon(job, local / held)
        if m > 1 and (job.syncs_last or job.sharding != "fsdp" or job.pp > 1):
            local += self.experts * (1 / job.ep - 1 / job.tp) / job.pp
            parts["optimizer"] += m * job.accumulate_bytes * local / self.rates.hbm
        doublings = math.log2(max(1, job.world_size / self.cluster.gpus_per_node))
        each = self.k["straggler"] * sum(parts.values()) + self.k["straggler_ms"] * 1e-3
        parts["stragglers"] = doublings * each
        factor = self.cluster.measured.get(f"step/{job.kernels}", self.k["step"])
        return Step(job, self.cluster, {name: factor * part for name, part in parts.items()})

    def _muon(self, job: Job, shard: float) -> float:
        """Newton-Schulz on the ranks that own matrices, and moving shards to them and back."""
        owners, matmul = job.world_size // job.pp, self.rates.matmul
        each = [
            job.ns_steps * (matmul(m, n, m) + matmul(m, m, m) + matmul(m, m, n))
            for m, n in counts.block_matrices(job.args)
        ]
        busiest = max(max(each), job.args.num_layers / job.world_size * sum(each))
        return busiest + 2 * self.ring(job.width * shard, owners, 1)

    def _slowest(self, job: Job, block: BlockTimes, head: float) -> tuple[int, int, bool]:
        """Returns (blocks, recomputed blocks, True if it has the head) of the slowest rank."""
        both, again = block.seconds(0) + block.seconds(1), sum(block.again)
        ranks = []
        for stages in rank_stages(job):
            count, recomputed = (sum(of[s] for s in stages) for of in (job.blocks, job.recomputed))
            ranks.append((count, recomputed, len(job.blocks) - 1 in stages))
        return max(ranks, key=lambda rank: rank[0] * both + rank[1] * again + rank[2] * head)

    def _compute(self, job: Job, block: BlockTimes, head: Pair, parts: Parts) -> None:
        m, (count, recomputed, has_head) = job.micro_steps, self._slowest(job, block, head[0])
        for name, part, again in zip_longest(BlockTimes._fields[:-1], block[:-1], block.again):
            parts[name] = m * (count * sum(part) + recomputed * (again or 0.0))
        parts["tp"] += m * has_head * head[1]
        parts["head"] = m * has_head * head[0]

    def exposed(self, network: float, compute: float) -> float:
        """Seconds that communication adds to the computation that overlaps with it."""
        return max(network, compute + self.k["interference"] * network) - compute

    def _units(self, job: Job, params: float, experts: float = 0.0) -> Pair:
        """Seconds to gather and to reduce parameters over the FSDP ranks (and replicas).

        Experts are sharded over fewer ranks: those with the same experts, which are `ep` apart.
        """
        gather = reduce = 0.0
        width = 2 * self.rates.scale
        dense = params / job.tp, 1 if job.float8_gather else width, job.tp
        routed = (experts / job.ep, width, job.ep) if experts else None
        for local, gathered, apart in filter(None, (dense, routed)):
            ranks, size = job.fsdp * job.tp // apart, local * job.reduce_bytes
            gather += self.ring(local * gathered, ranks, apart)
            reduce += self.ring(size, ranks, apart)
            reduce += self.ring(size / ranks, job.dp_replicate, apart * ranks, 2)
        return gather, reduce

    def shard(self, job: Job, block: BlockTimes, parts: Parts) -> None:
        """Adds the time that a step without a pipeline waits for parameters and gradients."""
        gather, reduce = self._units(job, *self.block_params)
        table = self.args.padded_vocab_size * self.args.dim
        first, last = self._units(job, table * (not self.args.tied_head)), self._units(job, table)
        layers, m = self.args.num_layers, job.micro_steps
        forward, backward = block.seconds(0), block.seconds(1, job.recomputed[0] / layers)
        if job.fsdp * job.dp_replicate == 1:
            return
        once = job.keeps_gathered and job.syncs_last
        total = 0.0
        for micro in {0, m - 1, 1 % m}:
            times = 1 if micro in (0, m - 1) else m - 2
            gathers = not once or micro == 0
            reduces = not job.syncs_last or micro == m - 1
            in_forward = gather if gathers else 0.0
            in_backward = (0.0 if job.keeps_gathered else gather) + (reduce if reduces else 0.0)
            exposed = self.exposed(in_forward, forward) + self.exposed(in_backward, backward)
            ends = (first[0] + gather if gathers else 0.0) + (
                first[1] + last[1] * self.args.tied_head + reduce if reduces else 0.0
            )
            passes = (1 if job.keeps_gathered else 2) * gathers
            total += times * (layers * exposed + ends + self._copies(job, passes, reduces))
        parts["fsdp"] = total

    def _copies(self, job: Job, gathers: int, reduces: int) -> float:
        """Seconds in which FSDP2 copies gathered parameters, and gradients before a reduction."""
        per_param = 4 * gathers * self.rates.scale
        per_param += reduces * (2 * self.rates.scale + job.reduce_bytes)
        local = (self.params - self.experts) / job.tp + self.experts / job.ep
        copied: float = self.rates.bytes["copies"] * per_param * local / job.pp
        return copied / self.rates.hbm

    def _pipeline(self, job: Job, block: BlockTimes, head: Pair, parts: Parts) -> None:
        m, passes = job.micro_steps, job.micro_steps // job.pipelined
        rank = sum(parts.values()) / m
        size = 2 * self.rates.scale * job.local_tokens * self.args.dim / job.tp
        # Pipeline neighbours are in different nodes if the rest of the mesh fills a node.
        far = job.tp * job.fsdp * job.dp_replicate >= self.cluster.gpus_per_node
        wide = self.rates.outer / self.cluster.gpus_per_node if far else self.rates.inner
        hop = self.k["node_hop_us" if far else "hop_us"] * 1e-6
        parts["pp"] = m * 2 * job.stages_per_rank * (size / min(wide, self.rates.inner) + hop)
        # Schedules that split backward compute weights' gradients in time that is otherwise idle.
        idle = 1 / 3 if SCHEDULES[job.schedule].splits_backward else 1.0
        parts["bubble"] = passes * (job.pp - 1) / job.stages_per_rank * idle * rank
        params, experts = self.params / job.pp, self.experts / job.pp
        if job.fsdp * job.dp_replicate > 1:
            units = 0.5 * sum(self._units(job, params - experts, experts))
            parts["fsdp"] = passes * (units + self._copies(job, 1, 1))


def rank_stages(job: Job) -> list[tuple[int, ...]]:
    """The stages of each pipeline rank."""
    p, v = job.pp, job.stages_per_rank
    if p > 1 and SCHEDULES[job.schedule].is_v:
        return [(rank, 2 * p - 1 - rank) for rank in range(p)]
    return [tuple(rank + p * number for number in range(v)) for rank in range(p)]


@dataclass(frozen=True)
class Step:
    """Seconds of a step on a cluster, by the names in PARTS."""

    job: Job
    cluster: Cluster
    parts: Parts

    @property
    def seconds(self) -> float:
        """Seconds of the step."""
        return sum(self.parts.values())

    @property
    def wps(self) -> float:
        """Tokens per second and device."""
        return self.job.tokens / self.job.world_size / self.seconds

    @property
    def watts(self) -> float:
        """Mean power of a device."""
        parts, k = self.parts, self.cluster.constants()
        busy = parts["matmul"] + parts["attention"] + 0.5 * parts["head"]
        memory = parts["elementwise"] + parts["optimizer"] + 0.5 * parts["head"]
        waiting = self.seconds - busy - memory
        share = busy + k["memory_watts"] * memory + k["waiting_watts"] * waiting
        idle = k["idle_watts"]
        return self.cluster.limit_w * (idle + (1 - idle) * share / self.seconds)
