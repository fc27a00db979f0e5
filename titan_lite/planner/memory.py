"""Bytes that the ranks of each pipeline place need at their peak.

The formulas describe what the dry run sees of this library; docs/planning.md compares them.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from titan_lite.models.args import DecoderArgs, MoEArgs
from titan_lite.planner.counts import num_block_params, num_experts, num_params
from titan_lite.planner.job import Job
from titan_lite.planner.step_time import rank_stages

# A layout counts as fitting below a share of the device's memory, and may fit up to all of it: the
# CUDA context, NCCL's buffers and fragmentation take the rest. The formulas are less sure of what
# context parallel and pipelines keep.
FITS, FITS_CP, FITS_PP = 0.92, 0.85, 0.72


@dataclass(frozen=True)
class Memory:
    """The peak of one place in the pipeline, in bytes by category."""

    place: int
    parts: dict[str, float]

    @property
    def bytes(self) -> float:
        """Sum of all categories."""
        return sum(self.parts.values())


def room(job: Job) -> float:
    """The share of a device's memory below which the job counts as fitting."""
    return FITS_PP if job.pp > 1 else FITS_CP if job.cp > 1 else FITS


def memory(job: Job) -> list[Memory]:
    """The peaks of all places in the pipeline."""
    return [_place(job, place, stages) for place, stages in enumerate(rank_stages(job))]


def peak(job: Job) -> Memory:
    """The largest peak; of places with as many blocks, the first keeps the most activations."""
    first: dict[object, tuple[int, tuple[int, ...]]] = {}
    for place, stages in enumerate(rank_stages(job)):
        has_head = len(job.blocks) - 1 in stages
        first.setdefault((has_head, *(job.blocks[stage] for stage in stages)), (place, stages))
    return max((_place(job, *moment) for moment in first.values()), key=lambda moment: moment.bytes)


@functools.cache
def _sizes(args: DecoderArgs) -> tuple[float, float, float]:
    """Parameters of a block, of the vocabulary's table, and of the rest of the ends."""
    blocks, table = num_block_params(args), args.padded_vocab_size * args.dim
    rest = num_params(args) - blocks - table * (1 if args.tied_head else 2)
    return blocks / args.num_layers, table, max(0, rest)


def kept_elements(job: Job, recompute: str) -> float:
    """Elements that one block keeps for backward, per token of a micro-batch on a rank."""
    args, t = job.args, job.tp
    heads, kv, H = args.attention_dim / t, args.kv_dim / t, args.num_heads / t
    experts = num_experts(args)
    f = experts * args.ffn_dim / t
    whole = args.dim / (t if job.sequence_parallel else 1)
    gated = args.ffn == "swiglu"
    if recompute == "full":
        return whole
    if recompute == "selective_op":
        return 2 * whole + heads + kv + f + 2 * H
    kept = 2 * heads + 2 * kv + (4 if gated else 2) * f + 2 * H + 2 * whole + 2 * args.dim
    if args.qk_norm:
        kept += heads + kv
    if isinstance(args, MoEArgs):
        # Each expert's rows, and its outputs, which are weighted.
        kept += 2 * experts * args.dim
    if args.attention_dropout:
        # Of each score: its softmax in float32, rounded, and what dropout leaves of it.
        kept += 4 * H * job.span
    return kept


def _in_flight(job: Job, place: int) -> float:
    """Micro-batches whose activations a pipeline rank keeps at once, of each of its stages."""
    if job.schedule == "GPipe":
        return job.pipelined
    p, v = job.pp, job.stages_per_rank
    if v == 1:
        return min(job.pipelined, p - place)
    # Of interleaved stages: those of the warm-up, and one (arXiv:2104.04473).
    return min(job.pipelined, ((v - 1) * p + 2 * (p - place - 1) + 1) / v)


def _place(job: Job, place: int, stages: tuple[int, ...]) -> Memory:
    args, t, N = job.args, job.tp, job.shards
    block, table, other = (size / t for size in _sizes(args))
    has_head = len(job.blocks) - 1 in stages
    params = sum(job.blocks[stage] for stage in stages) * block
    params += (0 in stages) * (table + other)
    params += has_head * table * (not args.tied_head or job.pp > 1)
    width, tokens = job.width, job.local_tokens
    stream = args.dim * width * tokens
    none, again = kept_elements(job, "none"), kept_elements(job, job.recompute)
    # What one micro-batch keeps in the stages of a rank.
    each = (
        width
        * tokens
        * sum(
            again * job.recomputed[stage] + none * (job.blocks[stage] - job.recomputed[stage])
            for stage in stages
        )
    )
    rows = args.padded_vocab_size / (t if job.loss_parallel else 1)
    chunks = job.loss_chunks or 1
    # Of each logit: its gradient, its logarithm in float32, and under tensor parallel both again.
    logits = tokens * job.head_token_fraction / chunks * rows * (width + 4) * (2 if t > 1 else 1)
    logits += table * (width + (4 if chunks > 1 else 0)) + 2 * stream
    # In a pipeline, tensor parallel keeps what it gathers of a stage's input and gradient.
    passed = (1 if has_head else 2) * stream if t > 1 and job.pp > 1 else 0.0
    backward = 1.35 * none * width * tokens + passed
    works = {"loss": logits, "backward": backward, "reducing": 5 * stream, "end": 0.0}
    state = (2 * job.moment_bytes + 4 * job.ema) * params
    if job.ns_steps:
        # Of a matrix Muon has its momentum alone, in float32.
        matrices = sum(job.blocks[stage] for stage in stages) * block
        state -= (2 * job.moment_bytes - 4) * matrices
    fixed = {"parameters": 4 * params / N, "optimizer": state / N}
    if args.positions == "rotary":
        # Cosines and sines in float32; a pipeline's rank has those of the whole model as well.
        fixed["tables"] = 8 * args.max_seq_len * args.rotary_dim * (2 if job.pp > 1 else 1)
    best: dict[str, float] = {}
    # A tensor-parallel embedding's gradient is that of the whole table on each rank.
    lookup = 4 * (t - 1) * table if 0 in stages else 0.0
    rounded = width * table * (t if 0 in stages else 1)
    for moment in _moments(job, place, params, block, table, lookup, rounded):
        if moment.name == "loss" and not has_head:
            continue
        parts = fixed | {"gradients": moment.sharded, "unsharded": moment.unsharded}
        parts["activations"] = moment.kept * each
        parts["logits" if moment.name == "loss" else "working"] = works[moment.name]
        best = max(best, parts, key=lambda parts: sum(parts.values()))
    return Memory(place, best)


class PeakCandidate(NamedTuple):
    """A moment that may be the peak; kept: micro-batches whose activations are there.

    unsharded: bytes of gathered weights and of gradients that are not yet reduced; sharded: of
    those that are.
    """

    name: str
    kept: float
    unsharded: float
    sharded: float = 0.0


def _moments(
    job: Job,
    place: int,
    params: float,
    block: float,
    table: float,
    lookup: float,
    rounded: float,
) -> Iterator[PeakCandidate]:
    width, m = job.width, job.micro_steps
    gradient = width + 4  # a weight and its gradient in float32
    if job.pp > 1 or job.shards == 1 or (job.keeps_gathered and job.syncs_last and m > 1):
        flying = _in_flight(job, place) if job.pp > 1 else 1
        count = job.pipelined if job.pp > 1 else m
        if count > flying:
            yield PeakCandidate("loss", flying, gradient * params + lookup)
            yield PeakCandidate("backward", flying, gradient * params + lookup)
        else:
            yield PeakCandidate("loss", flying, width * (params + table))
            yield PeakCandidate("backward", flying, width * params + 4 * block)
            if flying > 1:
                yield PeakCandidate("backward", flying - 1, gradient * params + lookup)
        yield PeakCandidate("end", flying - 1, gradient * params + rounded + lookup)
        return
    late = 4 * params if job.syncs_last and m > 1 else 0.0
    sharded = 4 * params / job.shards if m > 1 and not late else 0.0
    gathered = job.float8_gather
    if job.keeps_gathered:
        at_loss = width * (params + table)
        backward = width * params + 4 * block
    else:
        at_loss = 2 * width * table + (1 if gathered else width) * block
        backward = (2 * (1 if gathered else width) + 4) * block
    yield PeakCandidate("loss", 1, at_loss + late, sharded)
    yield PeakCandidate("backward", 1, backward + late, sharded)
    # Once a block's gradients are all there, FSDP copies them into one buffer to reduce.
    yield PeakCandidate("reducing", 1, backward + width * block + late, sharded)
