"""Converts a configuration of this library to a Job.

The only file of the planner that reads configurations.
"""

import functools
import itertools

from titan_lite.config.dims import ParallelDims
from titan_lite.config.optimizers import Muon
from titan_lite.config.parallel_rules import parallel_rules
from titan_lite.config.schema import Config, auto_loss_chunks
from titan_lite.models.args import DecoderArgs
from titan_lite.models.model_rules import model_rules
from titan_lite.models.plan import Plan
from titan_lite.models.stage_split import balanced
from titan_lite.planner import counts
from titan_lite.planner.job import Job, Recompute


def read_job(plan: Plan) -> Job:
    """Converts a plan to a job."""
    config, dims, args = plan.config, plan.dims, plan.args
    training, parallel, optimizer = config.training, config.parallel, config.optimizer
    span, share = plan.attended_tokens, plan.head_token_fraction
    blocks: tuple[int, ...] = (args.num_layers,)
    if dims.pp > 1 and parallel.pp_split == "explicit":
        stages = parallel.pp_stage_modules
        blocks = tuple(sum(name.startswith("layers.") for name in names) for names in stages)
    elif dims.pp > 1:
        blocks = stage_blocks(args, parallel.pp_split, parallel.num_stages, span, share)
    width = 4 if training.param_dtype == "float32" else 2
    section = config.activation_checkpoint
    recomputed = tuple(len(section.layers(count)) for count in blocks)
    mode: Recompute = "selective_op" if section.mode == "selective_op" else "full"
    compiled = config.compile.covers("model")
    tokens = training.local_batch_size * training.seq_len // dims.cp
    chunks = auto_loss_chunks(tokens * args.padded_vocab_size / dims.tp * 4)
    reshard = parallel.reshard_after_forward
    is_kept = reshard == "default" and (dims.pp > 1 or dims.fsdp == 1)
    return Job(
        **{axis: getattr(dims, axis) for axis in (*dims.AXES, "ep")},
        args=args,
        seq_len=training.seq_len,
        span=span,
        micro_batch=training.local_batch_size,
        micro_steps=plan.micro_steps,
        cp_method=parallel.cp_method,
        blocks=blocks,
        stages_per_rank=parallel.num_stages // dims.pp,
        schedule=parallel.pp_schedule,
        pipelined=parallel.micro_batches_per_pass(plan.micro_steps),
        keeps_gathered=is_kept or reshard == "never",
        syncs_last=parallel.gradient_sync == "last_micro_batch",
        sequence_parallel=parallel.sequence_parallel,
        loss_parallel=parallel.loss_parallel,
        async_tp=parallel.async_tp,
        recompute=mode if any(recomputed) else "none",
        recomputed=recomputed,
        saved=section.saved_ops,
        float8=config.float8.recipe,
        float8_gather=config.float8.fsdp_all_gather,
        width=width,
        reduce_bytes=4 if training.reduce_dtype == "float32" else 2,
        kernels="compile" if compiled else "native",
        attention="unfused" if args.attention_dropout else "flash",
        loss_bytes=14 if config.compile.covers("loss") else 28,
        loss_chunks=chunks if training.loss_chunks == "auto" else training.loss_chunks,
        moment_bytes=optimizer.state_bytes / 2,
        rounding_bytes=optimizer.rounding_bytes,
        ema=config.ema.enable,
        ns_steps=optimizer.ns_steps if isinstance(optimizer, Muon) else 0,
        head_token_fraction=share,
    )


@functools.cache
def stage_blocks(
    args: DecoderArgs, split: str, num_stages: int, span: int, head_token_fraction: float
) -> tuple[int, ...]:
    """Number of blocks of each pipeline stage, as parallel/pipeline.py splits them."""
    costs = [1] * args.num_layers
    if split == "parameters":
        looked_up = counts.num_looked_up_params(args)
        costs = [sum(counts.block_params(args, n, n + 1)) for n in range(args.num_layers)]
        costs[0] += looked_up + args.tied_head * args.vocab_size * args.dim
        costs[-1] += counts.num_params(args) - counts.num_block_params(args) - looked_up
    elif split == "time":
        active = [counts.num_active_params(args, n, n + 1) for n in range(args.num_layers)]
        costs = [6 * block + 12 * args.attention_dim * span for block in active]
        costs[-1] += round(6 * head_token_fraction * args.padded_vocab_size * args.dim)
    return tuple(end - start for start, end in balanced(costs, num_stages))


def is_legal(config: Config, dims: ParallelDims, args: DecoderArgs) -> bool:
    """Returns True if no rule rejects the layout."""
    if config.parallel.num_stages > args.num_layers:
        return False
    rules = itertools.chain(parallel_rules(config, dims), model_rules(config, args))
    return next(rules, None) is None
