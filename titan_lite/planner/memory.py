"""Peak memory of ranks, by place: a rank's position in the pipeline.

The formulas model the dry run of this library; docs/planning.md compares the two.
"""

import functools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from titan_lite.models.args import DecoderArgs, EncoderArgs, MoEArgs
from titan_lite.planner.counts import block_params, feed_forwards, num_block_params, num_params
from titan_lite.planner.job import Job
from titan_lite.planner.selective import saved_elements
from titan_lite.planner.step_time import rank_stages

# A layout fits if it needs at most this share of the device's memory, and may fit if it needs less
# than all of it. The rest is for the CUDA context, NCCL's buffers, fragmentation, and errors of the
# formulas, which are larger for context parallel and pipelines.
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
    return FITS_PP if job.pp > 1 else FITS_CP if job.cp > 1 else FITS


def memory(job: Job) -> list[Memory]:
    """Returns the peak of each place in the pipeline."""
    return [_place(job, place, stages) for place, stages in enumerate(rank_stages(job))]


def peak(job: Job) -> Memory:
    """Returns the largest peak; of equal places only the first, which keeps most activations."""
    first: dict[object, tuple[int, tuple[int, ...]]] = {}
    for place, stages in enumerate(rank_stages(job)):
        has_head = len(job.blocks) - 1 in stages
        first.setdefault((has_head, *(job.blocks[stage] for stage in stages)), (place, stages))
    return max((_place(job, *moment) for moment in first.values()), key=lambda moment: moment.bytes)


@functools.cache
def _ends(args: DecoderArgs) -> tuple[float, float]:
    """Parameters outside blocks: those of the vocabulary's table, and the others."""
    table = args.padded_vocab_size * args.dim
    rest = num_params(args) - num_block_params(args) - table * (1 if args.tied_head else 2)
    return table, max(0, rest)


@functools.cache
def _kinds(args: DecoderArgs, start: int, end: int) -> list[tuple[DecoderArgs, int]]:
    """The kinds of blocks in a range, each with its number of blocks."""
    return list(Counter(map(args.of_block, range(start, end))).items())


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


def _backward(job: Job, args: DecoderArgs, mode: str) -> float:
    """Largest number of bytes that the backward of a block adds to those that its forward kept.

    All recomputed activations are in memory when the feed-forward's gradients are computed.
    """
    t, tokens, D, wide = job.tp, job.local_tokens, args.dim, 4 / job.width
    shared, routed = feed_forwards(args)
    again = kept_elements(job, args, "none") - kept_elements(job, args, mode)
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
    # (Features per token, elements of weights' gradients) after the backward of the last matmul,
    # of the activation function, and of the first matmuls.
    moments = (
        (gathered + f, D * f),
        ((1 + gated) * f, D * f),
        ((1 + gated) * D - (1 + 2 * gated) * f, (2 + gated) * D * f),
    )
    largest = max(features * tokens + weights for features, weights in moments)
    return job.width * ((again + whole) * tokens + largest)


def _in_flight(job: Job, place: int) -> float:
    """Micro-batches whose activations a pipeline rank keeps at once, per stage."""
    if job.schedule == "GPipe":
        return job.pipelined
    p, v = job.pp, job.stages_per_rank
    if v == 1:
        return min(job.pipelined, p - place)
    # Interleaved stages: the micro-batches of the warm-up phase, plus one (arXiv:2104.04473).
    return min(job.pipelined, ((v - 1) * p + 2 * (p - place - 1) + 1) / v)


def _place(job: Job, place: int, stages: tuple[int, ...]) -> Memory:
    args, t, N, wide = job.args, job.tp, job.fsdp, 4 / job.width
    table, other = (size / t for size in _ends(args))
    has_head = len(job.blocks) - 1 in stages
    sizes = [block_params(args, *job.span_of(stage)) for stage in stages]
    dense, experts = (float(sum(size[kind] for size in sizes)) for kind in (0, 1))
    ends = (0 in stages) * (table + other) + has_head * table * (not args.tied_head or job.pp > 1)
    # stored: this place's parameters, sharded over its ranks. params: those that one rank gathers;
    # with expert parallel it has only some of the experts.
    matrices = (dense + experts) / t
    stored, params = matrices + ends, dense / t + experts / job.ep + ends
    last = block_params(args, args.num_layers - 1, args.num_layers)
    dense, experts = last[0] / t, last[1] / job.ep
    block = dense + experts
    width, tokens = job.width, job.local_tokens
    stream = float(args.dim * width * tokens)
    # each: bytes that one micro-batch keeps in a rank's stages: each block's input, and the output.
    # A later stage's first input is in a buffer that is counted as "received", so the output
    # replaces it here; only the first stage has one tensor more.
    each = stream / (t if job.sequence_parallel else 1) * (job.pp > 1 and 0 in stages)
    kinds: set[DecoderArgs] = set()
    for stage in stages:
        share = job.recomputed[stage] / job.blocks[stage]
        for kind, count in _kinds(args, *job.span_of(stage)):
            kinds.add(kind)
            kept = share * kept_elements(job, kind, job.recompute)
            kept += (1 - share) * kept_elements(job, kind, "none")
            each += width * tokens * count * kept
    rows = args.padded_vocab_size / (t if job.loss_parallel else 1)
    chunks = job.loss_chunks or 1
    # Per logit: its gradient, and its log-probability in float32. Then either the gradient of the
    # head's weight or, with tensor parallel, the logit less the maximum and its exponential.
    logits = tokens * job.head_token_fraction / chunks * rows
    logits = (width + 4) * logits + max(8 * logits * (t > 1), width * table)
    # An encoder adds the transform before the head, and the sum of the embeddings.
    logits += 4 * table * (chunks > 1) + (6 if isinstance(args, EncoderArgs) else 2) * stream
    mode = job.recompute if any(job.recomputed[stage] for stage in stages) else "none"
    backward = max(_backward(job, kind, mode) for kind in kinds)
    # The head's gradients are reduced while the last block's are computed; those of a tied head
    # stay until the end.
    is_apart = has_head and (job.pp > 1 or not args.tied_head)
    reducing, gradients = 5 * stream, 4 * max(block, table * is_apart)
    if isinstance(args, MoEArgs):
        reducing += 2 * wide * args.top_k * stream / t
        gradients = width * experts / 3
    works = {"loss": logits, "backward": backward, "reducing": reducing}
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
    best: dict[str, float] = {}
    # Each tensor-parallel rank computes the gradient of the whole embedding table.
    whole = (width + 4) * params + (4 * (t - 1) * table if 0 in stages else 0.0)
    works["end"] = width * table * (t if 0 in stages else 1)
    # With expert or tensor parallel, FSDP gathers and reduces experts separately.
    unit = block if job.ep * t == 1 else max(dense, experts)
    units = Units(params, block, unit, table, table * args.tied_head)
    for moment in _moments(job, place, units, whole, gradients, 4 * stored / N):
        if moment.name == "loss" and not has_head:
            continue
        parts = fixed | {"gradients": moment.sharded, "unsharded": moment.unsharded}
        parts["activations"] = moment.kept * each
        parts["logits" if moment.name == "loss" else "working"] = works.get(moment.name, 0.0)
        best = max(best, parts, key=lambda parts: sum(parts.values()))
    return Memory(place, best)


class PeakCandidate(NamedTuple):
    """A moment that may be the peak. kept: micro-batches whose activations are in memory.

    unsharded: bytes of gathered weights and of gradients that are not yet reduced.
    sharded: bytes of gradients that are.
    """

    name: str
    kept: float
    unsharded: float
    sharded: float = 0.0


class Units(NamedTuple):
    """Parameters of a place, a block, the block's largest FSDP unit, and the vocabulary's table.

    tied: those of a tied table, whose two gradients are added up; 0 if it is not tied.
    """

    params: float
    block: float
    largest: float
    table: float
    tied: float


def _moments(
    job: Job, place: int, units: Units, whole: float, gradients: float, sharded: float
) -> Iterator[PeakCandidate]:
    """Yields the moments that may be the peak.

    whole: bytes of all weights and their gradients. sharded: bytes of the gradients' shards.
    gradients: bytes of a block's gradients while most of its activations are still in memory.
    """
    width, m = job.width, job.micro_steps
    params, block, largest, table, tied = units
    is_alone = job.fsdp == 1 and job.keeps_gathered
    if job.pp > 1 or is_alone or (job.keeps_gathered and job.syncs_last and m > 1):
        flying = _in_flight(job, place) if job.pp > 1 else 1
        count = job.pipelined if job.pp > 1 else m
        if count > flying:
            yield PeakCandidate("loss", flying, whole)
            yield PeakCandidate("backward", flying, whole)
        else:
            yield PeakCandidate("loss", flying, width * (params + table))
            yield PeakCandidate("backward", flying, width * params + gradients)
            if flying > 1:
                yield PeakCandidate("backward", flying - 1, whole)
        yield PeakCandidate("end", flying - 1, whole)
        if (v := job.stages_per_rank) > 1:
            # All stages but the last have been reduced, and the last one's gradients are rounded.
            yield PeakCandidate("reduced", 0, whole + width * params / v, sharded * (1 - 1 / v))
        return
    late = 4 * params if job.syncs_last and m > 1 else 0.0
    at_end = 0.0 if late else sharded
    sharded = at_end if m > 1 else 0.0
    gathered = job.float8_gather
    if job.keeps_gathered:
        at_loss = width * (params + table)
        backward = width * (params + tied)
    else:
        at_loss = 2 * width * table + (1 if gathered else width) * block
        backward = 2 * (1 if gathered else width) * block + 2 * width * tied
    yield PeakCandidate("loss", 1, at_loss + late, sharded)
    yield PeakCandidate("backward", 1, backward + gradients + late, sharded)
    # FSDP copies a block's gradients into one buffer to reduce them.
    yield PeakCandidate("reducing", 1, backward + (width + 4) * largest + late, sharded)
    yield PeakCandidate("reduced", 0, 4 * max(table, block) + late, at_end)
