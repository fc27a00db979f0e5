"""Peak memory of ranks, by place: a rank's position in the pipeline.

The formulas model the dry run of this library; docs/planning.md compares the two.
"""

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from titan_lite.config.schedules import SCHEDULES
from titan_lite.models.args import DecoderArgs, EncoderArgs, MoEArgs
from titan_lite.planner.counts import block_params, feed_forwards, num_block_params, num_params
from titan_lite.planner.job import Job
from titan_lite.planner.selective import saved_elements
from titan_lite.planner.step_time import rank_stages

# A layout fits if it needs at most this share of the device's memory, and may fit if it needs less
# than all of it. The rest is for the CUDA context, NCCL's buffers, fragmentation, and errors of the
# formulas, which are larger for context parallel, experts and pipelines.
FITS, FITS_CP, FITS_PP = 0.92, 0.85, 0.72


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of one place in the pipeline, by category."""

    place: int
    parts: dict[str, float]

    @property
    def bytes(self) -> float:
        """Sum of all categories."""
        return sum(self.parts.values())


def room(job: Job) -> float:
    """The share of a device's memory up to which the job counts as fitting."""
    is_less_sure = job.cp > 1 or isinstance(job.args, MoEArgs)
    return FITS_PP if job.pp > 1 else FITS_CP if is_less_sure else FITS


def least(job: Job) -> float:
    """Bytes of parameters and optimizer state of a rank on average: less than the largest peak."""
    moments = 2 * job.moment_bytes if not job.ns_steps else min(4, 2 * job.moment_bytes)
    return (4 + moments + 4 * job.ema) * num_params(job.args) / (job.tp * job.pp * job.fsdp)


def memory(job: Job) -> list[Memory]:
    """Returns the peak of each place in the pipeline."""
    model = _MemoryModel(job)
    return [model.peak(place, stages) for place, stages in enumerate(rank_stages(job))]


def peak(job: Job) -> Memory:
    """Returns the largest peak; of equal places only the first, which keeps most activations."""
    first: dict[object, tuple[int, tuple[int, ...]]] = {}
    for place, stages in enumerate(rank_stages(job)):
        has_head = len(job.blocks) - 1 in stages
        first.setdefault((has_head, *(job.blocks[stage] for stage in stages)), (place, stages))
    model = _MemoryModel(job)
    return max((model.peak(*place) for place in first.values()), key=lambda peak: peak.bytes)


class Sizes(NamedTuple):
    """Parameters of a model's parts; of blocks those of every token, and those of experts.

    table: of the vocabulary. other: of what is neither a table nor a block. kinds: of blocks.
    counts: blocks of each kind in each stage.
    """

    table: int
    other: int
    last_block: tuple[int, int]
    stages: list[tuple[int, int]]
    kinds: list[DecoderArgs]
    counts: list[list[int]]


@functools.cache
def _sizes(args: DecoderArgs, blocks: tuple[int, ...]) -> Sizes:
    table, layers = args.padded_vocab_size * args.dim, args.num_layers
    other = num_params(args) - num_block_params(args) - table * (1 if args.tied_head else 2)
    every = [args.of_block(index) for index in range(layers)]
    kinds = list(dict.fromkeys(every))
    ends = [0, *itertools.accumulate(blocks)]
    spans = list(itertools.pairwise(ends))
    return Sizes(
        table,
        max(0, other),
        block_params(args, layers - 1, layers),
        [block_params(args, *span) for span in spans],
        kinds,
        [[every[start:end].count(kind) for kind in kinds] for start, end in spans],
    )


def kept_elements(job: Job, args: DecoderArgs, recompute: str) -> float:
    """Elements that a block keeps for backward, per token of a micro-batch on a rank."""
    # wide: size of a float32 number, in elements of the activations' dtype.
    t, wide = job.tp, 4 / job.width
    heads, kv, H = args.attention_dim / t, args.kv_dim / t, args.num_heads / t
    shared, routed = feed_forwards(args)
    f = (shared + routed) * args.ffn_dim / t
    whole = args.dim / (t if job.sequence_parallel else 1)
    if recompute == "full":
        return whole
    if recompute == "selective_op":
        return whole + saved_elements(job, args)
    kept = 2 * (heads + kv + H + whole + args.dim) + (4 if args.ffn == "swiglu" else 2) * f
    if args.qk_norm:
        kept += heads + kv
    if isinstance(args, MoEArgs) and routed:
        # The experts' inputs, and their outputs before weighting; the router's input in float32,
        # its scores, and their sort order.
        kept += 2 * (routed + wide - 1) * whole + 4 * wide * args.num_experts
    if args.attention_dropout:
        # Per score: its softmax in float32 and rounded, and dropout's result.
        kept += 4 * H * job.span
    return kept


Moment = tuple[str, float, float, float]
"""A moment that may be the peak: its name, micro-batches whose activations are in memory, bytes of
gathered weights and of gradients that are not reduced yet, and bytes of gradients that are."""


class _MemoryModel:
    """Computes the peaks of a job's places, and once what they share."""

    def __init__(self, job: Job) -> None:
        self.job, self.sizes = job, _sizes(job.args, job.blocks)
        args, kinds, t, tokens = job.args, self.sizes.kinds, job.tp, job.local_tokens
        self.kept: dict[str, list[float]] = {
            mode: [kept_elements(job, kind, mode) for kind in kinds]
            for mode in (job.recompute, "none")
        }
        # Micro-batches at the last stage; these schedules have no backward before the last forward.
        self.at_last = job.pipelined if job.schedule in ("GPipe", "LoopedBFS") and job.pp > 1 else 1
        self.table, self.stream = self.sizes.table / t, float(args.dim * job.width * tokens)
        self.dense, self.experts = self.sizes.last_block[0] / t, self.sizes.last_block[1] / job.ep
        self.block = self.dense + self.experts
        self.matrix = max(args.dim * args.ffn_dim, self.sizes.last_block[1] / 3)
        rows = args.padded_vocab_size / (t if job.loss_parallel else 1)
        chunks = job.loss_chunks or 1
        # Per logit: its gradient, and its log-probability in float32. Then either the gradient of
        # the head's weight or, with tensor parallel, the logit less the maximum, exponentiated.
        logits = tokens * job.head_token_fraction / chunks * rows
        logits = (job.width + 4) * logits + max(8 * logits * (t > 1), job.width * self.table)
        # An encoder adds the transform before the head, and the sum of the embeddings.
        streams = (6 if isinstance(args, EncoderArgs) else 2) * self.stream
        self.logits = logits + (4 * self.table * (chunks > 1) + streams)

    def activations(self, stages: tuple[int, ...]) -> float:
        """Bytes that one micro-batch keeps in a rank's stages: each block's input, and the output.

        A later stage's first input is in a buffer that is counted as "received", so the output
        replaces it here; only the first stage has one tensor more.
        """
        job = self.job
        each = self.stream / (job.tp if job.sequence_parallel else 1) * (job.pp > 1 and 0 in stages)
        for stage in stages:
            share = job.recomputed[stage] / max(1, job.blocks[stage])
            # Tensors recomputed for the gradients of inputs are kept for those of weights.
            share *= not (job.pp > 1 and SCHEDULES[job.schedule].splits_backward)
            for number, count in enumerate(self.sizes.counts[stage]):
                kept = share * self.kept[job.recompute][number] if share else 0.0
                kept += (1 - share) * self.kept["none"][number] if share < 1 else 0.0
                each += job.width * job.local_tokens * count * kept
        return each

    def peak(self, place: int, stages: tuple[int, ...]) -> Memory:
        """The peak of one place."""
        job, args, sizes, table = self.job, self.job.args, self.sizes, self.table
        t, N, width, stream = job.tp, job.fsdp, job.width, self.stream
        has_head = len(job.blocks) - 1 in stages
        dense, experts = map(sum, zip(*(sizes.stages[stage] for stage in stages), strict=True))
        ends = (0 in stages) * (table + sizes.other / t)
        ends += has_head * table * (not args.tied_head or job.pp > 1)
        # stored: this place's parameters, sharded over its ranks. params: those that one rank
        # gathers; with expert parallel it has only some of the experts.
        matrices = (dense + experts) / t
        stored, params = matrices + ends, dense / t + experts / job.ep + ends
        state = (2 * job.moment_bytes + 4 * job.ema) * stored
        if job.ns_steps:
            # For a matrix, Muon stores only its momentum, in float32.
            state -= (2 * job.moment_bytes - 4) * matrices
        fixed = {"parameters": 4 * stored / N, "optimizer": state / N}
        if args.positions == "rotary":
            # Cosines and sines in float32; a pipeline rank has the whole model's as well.
            fixed["tables"] = 8 * args.max_seq_len * args.rotary_dim * (2 if job.pp > 1 else 1)
        # A pipeline stage has a buffer for each micro-batch's input, and one for its gradient.
        ways = sum((stage > 0) + (stage < len(job.blocks) - 1) for stage in stages)
        fixed["received"] = ways * job.pipelined * stream / (t if job.sequence_parallel else 1)
        mode = job.recompute if any(job.recomputed[stage] for stage in stages) else "none"
        counts = zip(*(sizes.counts[stage] for stage in stages), strict=True)
        kinds = [number for number, count in enumerate(counts) if any(count)]
        # An optimizer that rounds its moments takes one tensor after the other, in chunks.
        tensor = max(table * (0 in stages or has_head), 0 if job.ns_steps else self.matrix / t)
        rounded = job.rounding_bytes * min(2**24, tensor / N)
        # The head's gradients are reduced while the last block's are computed; those of a tied head
        # stay until the end.
        is_apart = has_head and (job.pp > 1 or not args.tied_head)
        reducing, gradients = 5 * stream, 4 * max(self.block, table * is_apart)
        if isinstance(args, MoEArgs):
            reducing += 2 * 4 / width * args.top_k * stream / t
            gradients = width * self.experts / 3
        works = {
            # Each micro-batch's gradients of the head wait for its backward.
            "loss": self.logits + (self.at_last - 1) * (width * table + stream),
            "backward": max((self.backward(kind, mode) for kind in kinds), default=0),
            "reducing": reducing,
            "end": width * table * (t if 0 in stages else has_head),
            "embedding": width * table * t,
            # Muon's owner of a matrix, or of a stack of experts, has five copies of it.
            "step": max(rounded, 5 * width * self.matrix * (job.ns_steps > 0)),
        }
        # Each tensor-parallel rank computes the gradient of the whole embedding table.
        whole = (width + 4) * params + (4 * (t - 1) * table if 0 in stages else 0.0)
        each, best, largest = self.activations(stages), {}, -1.0
        moments = self.moments(place, params, whole, gradients, 4 * stored / N)
        for name, kept, unsharded, sharded in moments:
            if name == "loss" and not has_head:
                continue
            parts = fixed | {"gradients": sharded, "unsharded": unsharded}
            parts["activations"] = kept * each
            parts["logits" if name == "loss" else "working"] = works.get(name, 0.0)
            if (size := sum(parts.values())) > largest:
                best, largest = parts, size
        return Memory(place, best)

    def backward(self, kind: int, mode: str) -> float:
        """Largest number of bytes that the backward of a block adds to those that its forward kept.

        All recomputed activations are in memory when the feed-forward's gradients are computed.
        """
        job, args = self.job, self.sizes.kinds[kind]
        t, tokens, D, wide = job.tp, job.local_tokens, args.dim, 4 / job.width
        shared, routed = feed_forwards(args)
        again = self.kept["none"][kind] - self.kept[mode][kind]
        if routed:
            # Per row: either its weighted output and the gradient of that, in float32, or the
            # gradients of its expert's inner features, during the gradient of one of three weights.
            row = max((1 + 2 * wide) * D, D / 2 + 2 * args.ffn_dim)
            return (again + routed * row / t) * tokens * job.width
        if args.attention_dropout:
            # Dropout's hashes, three 32-bit integers per score; forward needs them as well.
            again += 3 * wide * args.num_heads / t * job.span
        f, gated = shared * args.ffn_dim / t, args.ffn == "swiglu"
        whole = D / (t if job.sequence_parallel else 1)
        gathered = D if t > 1 and job.sequence_parallel else 0
        # (Features per token, elements of weights' gradients) after the backward of the last
        # matmul, of the activation function, and of the first matmuls.
        moments = (
            (gathered + f, D * f),
            ((1 + gated) * f, D * f),
            ((1 + gated) * D - (1 + 2 * gated) * f, (2 + gated) * D * f),
        )
        largest = max(features * tokens + weights for features, weights in moments)
        return job.width * ((again + whole) * tokens + largest)

    def in_flight(self, place: int) -> float:
        """Micro-batches whose activations a pipeline rank keeps at once, per stage."""
        job = self.job
        schedule = SCHEDULES[job.schedule]
        if schedule.splits_backward and schedule.is_v:
            return min(job.pipelined, 2 * job.pp)
        if self.at_last > 1 or schedule.splits_backward:
            return job.pipelined
        p, v = job.pp, job.stages_per_rank
        if v == 1:
            return min(job.pipelined, p - place)
        # Interleaved stages: the micro-batches of the warm-up phase, plus one (arXiv:2104.04473).
        return min(job.pipelined, ((v - 1) * p + 2 * (p - place - 1) + 1) / v)

    def moments(
        self, place: int, params: float, whole: float, gradients: float, sharded: float
    ) -> Iterator[Moment]:
        """Yields the moments that may be the peak.

        whole: bytes of all weights and their gradients. sharded: bytes of the gradients' shards.
        gradients: bytes of a block's gradients while most of its activations are still in memory.
        """
        job, block, table = self.job, self.block, self.table
        width, m = job.width, job.micro_steps
        yield "step", 0, 0.0, sharded
        # With expert or tensor parallel, FSDP gathers and reduces experts separately.
        largest = block if job.ep * job.tp == 1 else max(self.dense, self.experts)
        tied = table * job.args.tied_head
        is_alone = job.fsdp == 1 and job.keeps_gathered
        if job.pp > 1 or is_alone or (job.keeps_gathered and job.syncs_last and m > 1):
            flying = self.in_flight(place) if job.pp > 1 else 1
            count = job.pipelined if job.pp > 1 else m
            if count > flying:
                yield "loss", flying, whole, 0.0
                yield "backward", flying, whole, 0.0
            else:
                yield "loss", flying, width * (params + table), 0.0
                yield "backward", flying, width * params + gradients, 0.0
                if flying > 1:
                    yield "backward", flying - 1, whole, 0.0
            yield "end", flying - 1, whole, 0.0
            if (v := job.stages_per_rank) > 1:
                # All stages but the last have been reduced; the last one's gradients are rounded.
                yield "reduced", 0, whole + width * params / v, sharded * (1 - 1 / v)
            return
        late = whole - width * params if job.syncs_last and m > 1 else 0.0
        at_end = 0.0 if late else sharded
        sharded = at_end if m > 1 else 0.0
        gathered = job.float8_gather
        if job.keeps_gathered:
            at_loss = width * (params + table)
            backward = width * (params + tied)
        else:
            at_loss = 2 * width * table + (1 if gathered else width) * block
            backward = 2 * (1 if gathered else width) * block + 2 * width * tied
        yield "loss", 1, at_loss + late, sharded
        yield "backward", 1, backward + gradients + late, sharded
        # FSDP copies a block's gradients into one buffer to reduce them.
        yield "reducing", 1, backward + (width + 4) * largest + late, sharded
        yield "reduced", 0, 4 * max(table, block) + late, at_end
        # The first block is the last one in backward; after it comes the embedding.
        layers = job.args.num_layers
        earlier = 0.0 if late else at_end - 4 * table / job.fsdp
        yield "backward", 1 / layers, backward + gradients + late, earlier - at_end / layers
        yield "embedding", 0, 4 * table + 2 * width * tied + late, earlier
