"""Warnings about settings that have no effect, or that waste work."""

import logging
from collections.abc import Iterator

from titan_lite.config.dims import ParallelDims
from titan_lite.config.load import DEFAULT, LoadedConfig
from titan_lite.config.needs import unmet_needs, value_of
from titan_lite.config.optimizers import Muon
from titan_lite.config.problems import quote
from titan_lite.config.schema import Config
from titan_lite.models.args import DecoderArgs, MoEArgs
from titan_lite.models.family import Family

logger = logging.getLogger("titan_lite.config")


def log_warnings(
    loaded: LoadedConfig, dims: ParallelDims, family: Family, args: DecoderArgs
) -> None:
    """Logs a sentence for each setting that has no effect, or wastes work, in this run."""
    for warning in (
        *_wasteful(loaded.config, dims),
        *_uncompiled(loaded.config, args.attention_dropout),
        *_without_effect(loaded, dims, family),
        *_missing_saved_ops(loaded, args),
    ):
        logger.warning("%s", warning)


def _wasteful(config: Config, dims: ParallelDims) -> Iterator[str]:
    """Settings that are valid but probably not intended."""
    data, scheduler, steps = config.data, config.lr_scheduler, config.training.steps
    if data.num_streams % dims.batch:
        yield (
            f"data.num_streams ({data.num_streams}) is not a multiple of the data-parallel degree "
            f"({dims.batch} at world size {dims.world_size}): some documents are read and "
            "tokenized by more than one rank"
        )
    if data.shuffle and data.shuffle_buffer < 2 * data.num_streams:
        yield (
            f"data.shuffle_buffer ({data.shuffle_buffer}) is below 2 x data.num_streams "
            f"({data.num_streams}) = {2 * data.num_streams}, so nothing is shuffled"
        )
    warmup, lr = scheduler.warmup_steps, f"optimizer.lr ({config.optimizer.lr:g})"
    if warmup > steps:
        yield (
            f"lr_scheduler.warmup_steps ({warmup}) > training.steps ({steps}): "
            f"the learning rate never reaches {lr}"
        )
    if warmup == steps:
        yield (
            f"lr_scheduler.warmup_steps ({warmup}) = training.steps: "
            f"the learning rate does not reach {lr} before the last step"
        )
    optimizer = config.optimizer
    rounds = isinstance(optimizer, Muon) and optimizer.ns_dtype == "bfloat16"
    if rounds and config.training.param_dtype == "float32":
        yield (
            'optimizer.ns_dtype = "bfloat16" rounds the updates of float32 parameters: those of '
            'two layouts differ by up to 2 %, with "float32" by at most 1e-5'
        )
    decay_steps = round(scheduler.decay_ratio * steps)
    if scheduler.decay_type == "constant" or scheduler.decay_ratio == 1:
        return
    if decay_steps == 0:
        yield (
            f"lr_scheduler.decay_type ({quote(scheduler.decay_type)}) has no effect because "
            f"decay_ratio ({scheduler.decay_ratio:g}) x training.steps ({steps}) is 0 steps"
        )
    elif scheduler.warmup_steps + decay_steps > steps:
        yield (
            f"lr_scheduler: warm-up ({scheduler.warmup_steps}) and decay ({decay_steps} steps, "
            f"decay_ratio {scheduler.decay_ratio:g}) are longer than training.steps ({steps}): "
            "the decay starts late, at the end of the warm-up"
        )


def _uncompiled(config: Config, attention_dropout: float) -> Iterator[str]:
    """Features that take many passes over memory unless a compiler fuses them."""
    if config.compile.covers("model"):
        return
    if config.float8.recipe != "none" and not config.float8.emulate:
        yield (
            f"float8.recipe ({quote(config.float8.recipe)}) is slow without compile.enable = true: "
            "every cast takes several kernels, which cost more than float8 matmuls save"
        )
    if attention_dropout:
        yield (
            f"model.attention_dropout ({attention_dropout:g}) is slow without compile.enable = "
            "true: generating the dropout mask reads or writes the seq_len x seq_len scores of "
            "each head about 15 times"
        )


def _without_effect(loaded: LoadedConfig, dims: ParallelDims, family: Family) -> Iterator[str]:
    """Keys that were set but have no effect because of another key or the layout."""
    config = loaded.config
    # Random second texts come from the documents of the buffer, even without shuffling.
    makes_pairs = family.objective == "masked_lm" and config.masked_lm.next_sentence
    reasons = {
        f"{table}.{key}": need.unmet(config, table)
        for table, key, need in unmet_needs(config)
        if not (makes_pairs and key == "shuffle_buffer")
    }
    for key, reason in _by_layout(config, dims):
        if value_of(config, key) != value_of(Config(), key):
            reasons.setdefault(key, reason)
    for key, reason in reasons.items():
        yield f"{key} ({loaded.origins[key]}) has no effect because {reason}"


def _by_layout(config: Config, dims: ParallelDims) -> Iterator[tuple[str, str]]:
    """Yields keys that have no effect in this layout, and the reason."""
    training, key = config.training, "parallel.gradient_sync"
    at_once = training.local_batch_size * dims.batch
    if dims.fsdp * dims.dp_replicate == 1:
        yield key, f"no gradient is reduced {dims.at_world_size}"
    elif dims.pp > 1:
        yield key, "a pipeline reduces gradients at the end of each pass"
    elif training.global_batch_size in (-1, at_once):
        yield key, f"a step is one micro-batch {dims.at_world_size}"
    if dims.fsdp == 1:
        unsharded = f"nothing is sharded {dims.at_world_size}"
        yield "float8.fsdp_all_gather", unsharded
        yield "parallel.fsdp_symm_mem", unsharded
    if (freq := config.profiling.profile_freq) > training.steps:
        yield (
            "profiling.enable_profiling",
            f"profiling.profile_freq ({freq}) > training.steps ({training.steps})",
        )


def _missing_saved_ops(loaded: LoadedConfig, args: DecoderArgs) -> Iterator[str]:
    """Operations in activation_checkpoint.save that this run does not have."""
    config, key = loaded.config, "activation_checkpoint.save"
    if loaded.origins[key] == DEFAULT:
        return
    recipe, parallel = config.float8.recipe, config.parallel
    tp, sequence_parallel = parallel.tp, parallel.sequence_parallel
    dropout = args.attention_dropout
    layout = f"parallel.tp is {tp}, sequence_parallel {str(sequence_parallel).lower()}"
    no_experts = (not isinstance(args, MoEArgs), "the model has no experts")
    ulysses = parallel.cp > 1 and parallel.cp_method == "ulysses"
    missing = {
        "attention": (dropout > 0, f"attention_dropout is {dropout:g}"),
        "reduce_scatter": (tp == 1 or not sequence_parallel, layout),
        "all_reduce": (tp == 1 or (sequence_parallel and recipe != "tensorwise"), layout),
        "max": (recipe != "tensorwise", f"float8.recipe is {quote(recipe)}"),
        "routing": no_experts,
        "grouped_matmul": no_experts,
        "all_to_all": (parallel.ep == 1 and not ulysses, "parallel.ep is 1"),
    }
    for name in config.activation_checkpoint.saved_ops:
        is_missing, reason = missing.get(name, (False, ""))
        if is_missing:
            yield f"{key} ({loaded.origins[key]}): {quote(name)} has no effect because {reason}"
