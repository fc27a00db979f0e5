"""Seconds of single kernels and collectives: matmuls, attention, element-wise kernels, rings.

FLOPs and bytes are counted by hand. Rates are a cluster's peaks times the planner's constants.
"""

import math
from typing import Any

from titan_lite.planner.cluster import Cluster
from titan_lite.planner.constants import KERNELS
from titan_lite.planner.counts import attention_matrices, feed_forwards
from titan_lite.planner.job import Job

# (rows, columns) of the output tile of a matmul kernel, and the share of the rate it reaches.
TILES = ((256, 128, 1.0), (128, 128, 0.95), (128, 64, 0.82))


class Rates:
    """Rates of a cluster's kernels; __init__ reads only values that are equal in all layouts."""

    def __init__(self, cluster: Cluster, job: Job) -> None:
        self.k = k = cluster.constants(job.stack)
        self.cluster, self.args = cluster, job.args
        self.bytes = KERNELS[job.kernels]
        self.peak = cluster.peak("bfloat16" if job.width == 2 else "float32")
        self.matmul_rate = self.peak * k["matmul"] * cluster.throttle
        self.float8_rate = cluster.peak("float8") * k["matmul"] * k["float8"] * cluster.throttle
        self.hbm = cluster.hbm * k["hbm"]
        self.scale = job.width / 2
        self.launch = k["kernel_us"] * 1e-6
        # In one direction.
        self.inner = (cluster.device.link_gbs or 64.0) / 2 * 1e9 * k["link"]
        self.outer = cluster.node_nic_gbs * 1e9 * k["nic"]

    def matmul(self, M: float, K: float, N: float, float8: bool = False, groups: int = 1) -> float:
        """Seconds of an (M, K) x (K, N) product, or of `groups` such products in one kernel."""
        units = self.cluster.device.multiprocessors
        best = 0.0
        for rows, columns, quality in TILES:
            waves = groups * math.ceil(M / rows) * math.ceil(N / columns) / units
            best = max(best, quality * waves / math.ceil(waves))
        inner = self.k["inner8" if float8 else "inner"]
        rate = self.float8_rate if float8 else self.matmul_rate
        flops = 2 * groups * M * K * N
        moved = 2 * groups * (M * K + K * N + M * N) * self.scale
        return max(flops * (K + inner) / (rate * best * K), moved / self.hbm) + self.launch

    def linear(self, M: float, K: float, N: float, **kind: Any) -> tuple[float, float]:
        """Seconds of a linear layer, forward and backward."""
        to_input = self.matmul(M, N, K, **kind)
        return self.matmul(M, K, N, **kind), to_input + self.matmul(K, M, N, **kind)

    def attention(self, job: Job) -> tuple[float, float]:
        """Seconds of one block's attention for a micro-batch, forward and backward."""
        k, args = self.k, self.args
        queries, span = job.local_tokens, job.span
        heads = args.num_heads / job.tp
        flops = 4 * queries * span * args.attention_dim / job.tp
        if job.attention == "unfused":
            products = flops / (self.matmul_rate * k["unfused_matmul"])
            scores = queries * span * heads * self.scale / self.hbm
            drop = 5 if args.attention_dropout else 0
            return products + (13 + drop) * scores, 2 * products + (18 + drop) * scores
        flops *= 0.5 if args.causal else 1
        if args.causal and not job.cp_balanced:
            # The rank with the end of the sequence attends to all of it.
            flops *= 2 * job.cp / (job.cp + 1)
        rate = self.peak * k[f"attention/{job.attention}"]
        # Whole tiles are computed along the diagonal.
        tiles = span if args.causal else math.inf
        forward = k["attention_forward"] / (1 + k["attention_forward_tokens"] / tiles)
        backward = k["attention_backward"] / (1 + k["attention_backward_tokens"] / tiles)
        return flops / (rate * forward), 2.5 * flops / (rate * backward)

    def elementwise(self, job: Job) -> tuple[float, float]:
        """Seconds of the other kernels of one block for a micro-batch, forward and backward."""
        args, t, table = self.args, job.tp, self.bytes
        whole = args.dim / (t if job.sequence_parallel else 1)
        heads, kv = args.attention_dim / t, args.kv_dim / t
        activation = table["gated" if args.ffn == "swiglu" else "plain"]
        rotary = heads + kv if args.positions == "rotary" else 0
        copied = heads if args.num_kv_heads < args.num_heads else 0
        # A dropout where attention and feed-forward add to the residual.
        drop = 10 * whole if args.hidden_dropout else 0
        shared, routed = feed_forwards(args)
        # Experts: rows are gathered, weighted in float32, added up and put back; with expert
        # parallel they are gathered again after the exchange.
        moved = (18 + 8 * (job.ep > 1)) * routed * whole
        forward, backward = (
            2 * whole * (table["norm"][way] + table["residual"][way])
            + rotary * table["rotary"][way]
            + activation[way] * (shared + routed) * args.ffn_dim / t
            + copied * table["copy"][way]
            + drop
            + moved
            + (2 * table["norm"][way] * heads if args.qk_norm else 0)
            for way in (0, 1)
        )
        tokens = job.local_tokens * self.scale
        casts = [0.0, 0.0]
        if job.float8 != "none":
            # 5 bytes per element of each matmul's input and of each output's gradient, 2 for each
            # transposed copy; q, k, v share an input, as do gate and up.
            inner, width = shared * args.ffn_dim / t, 2 if args.ffn == "swiglu" else 1
            ins = 2 * args.dim / (t if job.sequence_parallel else 1) + heads + inner
            outs = heads + 2 * kv + 2 * args.dim + width * inner
            matrices = [*attention_matrices(args), ((1 + width) * args.dim, shared * args.ffn_dim)]
            weights = sum(math.prod(sides) for sides in matrices) / t
            casts = [tokens * 5 * ins + 5 * weights, tokens * (2 * ins + 7 * outs) + 2 * weights]
        launches = table["launches"] * self.launch
        return (
            (forward * tokens + casts[0]) / self.hbm + launches,
            (backward * tokens + casts[1]) / self.hbm + 2 * launches,
        )

    def loss(self, job: Job, tokens: float, rows: float) -> float:
        """Seconds of the cross-entropy of `tokens` over `rows` entries of the vocabulary."""
        return job.loss_bytes * tokens * rows / (self.hbm * self.k["loss"])

    def optimizer(self, params: float) -> float:
        """Seconds of the optimizer's step on a rank's parameters."""
        # Both moments, gradient and norm in float32, and the copy in bfloat16: 44 bytes.
        return 44 * params / (self.hbm * self.k["optimizer"])

    def ring(self, size: float, ranks: int, inner: int) -> float:
        """Seconds to gather or reduce-scatter `size` bytes; `inner` of the ranks are in a node."""
        if ranks == 1:
            return 0.0
        return size * (ranks - 1) / ranks / self.bandwidth(ranks, inner) + self.hops(ranks, inner)

    def all_to_all(self, size: float, ranks: int, inner: int) -> float:
        """Seconds for each rank to send an equal part of `size` bytes to every other rank."""
        near, far = size * (inner - 1) / ranks, size * (ranks - inner) / ranks
        # Traffic that leaves the node gets this rank's share of the node's network.
        sent = max(near / self.inner, far / self.bandwidth(ranks, 1))
        return sent + self.hops(ranks, inner)

    def hops(self, ranks: int, inner: int) -> float:
        """Latency of one round of the ranks."""
        nodes = max(1, ranks // inner)
        far = nodes * self.k["node_hop_us"] if nodes > 1 else 0.0
        return ((ranks - nodes) * self.k["hop_us"] + far) * 1e-6

    def bandwidth(self, ranks: int, inner: int) -> float:
        """Bytes per second of a ring; all rings of a node share the node's network."""
        if ranks <= inner:
            return self.inner
        return min(self.inner, self.outer * inner / self.cluster.gpus_per_node)
