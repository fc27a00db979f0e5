"""Settings that were made but cannot act, or waste work: a sentence for each."""

import itertools
import logging
from collections.abc import Iterator

from titan_lite.config.dims import ParallelDims
from titan_lite.config.load import DEFAULT, LoadedConfig
from titan_lite.config.problems import FIELDS, quote
from titan_lite.config.schema import Config

logger = logging.getLogger("titan_lite.config")

Idle = tuple[str, tuple[str, ...]]
"""Why some keys cannot act, and which."""

PIPELINE_KEYS = (
    "pp_schedule",
    "pp_stages_per_rank",
    "pp_micro_batches",
    "pp_split",
    "pp_stage_modules",
)
# Keys of [activation_checkpoint], each of which is read in one mode.
MODE_OF = {
    "every_nth": "every_nth",
    "first_k": "first_k",
    "fraction": "fraction",
    "save": "selective_op",
    "memory_budget": "memory_budget",
}


def log_warnings(
    loaded: LoadedConfig, dims: ParallelDims, *, objective: str, attention_dropout: float
) -> None:
    """Logs a sentence for each setting that was made but cannot act, or wastes work, in this run.

    objective: what the model's family learns. attention_dropout: the model's.
    """
    for warning in (
        *_wasteful(loaded.config, dims),
        *_uncompiled(loaded.config),
        *_idle(loaded, dims, objective),
        *_idle_saved_ops(loaded, attention_dropout),
    ):
        logger.warning("%s", warning)


def _wasteful(config: Config, dims: ParallelDims) -> Iterator[str]:
    """Settings that act, but hardly as meant."""
    data, scheduler, steps = config.data, config.lr_scheduler, config.training.steps
    if data.num_streams % dims.batch:
        yield (
            f"data.num_streams ({data.num_streams}) is not a multiple of the data-parallel degree "
            f"({dims.batch}): some documents are read and tokenized by more than one rank"
        )
    if data.shuffle and data.shuffle_buffer < 2 * data.num_streams:
        yield (
            f"data.shuffle_buffer ({data.shuffle_buffer}) leaves fewer than 2 documents to each of "
            f"the data.num_streams ({data.num_streams}): nothing is shuffled"
        )
    if scheduler.warmup_steps >= steps:
        yield (
            f"lr_scheduler.warmup_steps ({scheduler.warmup_steps}) are not over before "
            f"training.steps ({steps}) are: the peak optimizer.lr ({config.optimizer.lr:g}) "
            "is not reached"
        )
    decay_steps = round(scheduler.decay_ratio * steps)
    if scheduler.decay_type == "constant" or scheduler.decay_ratio == 1:
        return
    if decay_steps == 0:
        yield (
            f"lr_scheduler.decay_type ({quote(scheduler.decay_type)}) cannot act: decay_ratio "
            f"({scheduler.decay_ratio:g}) of {steps} steps is no step"
        )
    elif scheduler.warmup_steps + decay_steps > steps:
        yield (
            f"lr_scheduler: warm-up ({scheduler.warmup_steps}) and decay ({decay_steps} steps, "
            f"decay_ratio {scheduler.decay_ratio:g}) are longer than training.steps ({steps}): "
            "the decay starts late, at the end of the warm-up"
        )


def _uncompiled(config: Config) -> Iterator[str]:
    """Features that take many passes over memory unless a compiler fuses them."""
    if config.compile.covers("model"):
        return
    if config.float8.recipe != "none" and not config.float8.emulate:
        yield (
            f"float8.recipe ({quote(config.float8.recipe)}) is slow without compile.enable = true: "
            "every cast takes several kernels, which cost more than float8 matmuls save"
        )


def _idle(loaded: LoadedConfig, dims: ParallelDims, objective: str) -> Iterator[str]:
    """Keys that somebody changed and another key switches off."""
    config = loaded.config
    for reason, keys in itertools.chain(
        _checkpoint(config),
        _profiling(config),
        _training(config),
        _parallel(config, dims),
        _pipeline(config, dims),
        _compile_and_float8(config, dims),
        _activation_checkpoint(config),
        _data(config, objective),
        _validation(config),
        _optimizer(config),
    ):
        for key in keys:
            section, _, name = key.partition(".")
            if getattr(getattr(config, section), name) != FIELDS[section][name].default:
                yield f"{key} ({loaded.origins[key]}) cannot act: {reason}"


def _checkpoint(config: Config) -> Iterator[Idle]:
    section = config.checkpoint
    if not section.enable:
        act = ("enable", "load_step", "initial_load_path", "initial_load_hf")
        idle = (f"checkpoint.{key}" for key in FIELDS["checkpoint"] if key not in act)
        yield "checkpoint.enable is false", tuple(idle)
        return
    if section.keep_latest_k == 0:
        yield "checkpoint.keep_latest_k = 0 keeps all", ("checkpoint.keep_every",)
    if not section.last_save_model_only:
        yield "checkpoint.last_save_model_only is false", ("checkpoint.export_dtype",)
    if not section.last_save_hf:
        yield "checkpoint.last_save_hf is false", ("checkpoint.allow_export_mismatch",)
    if not section.initial_load_path:
        yield (
            "checkpoint.initial_load_path is not set",
            (
                "checkpoint.initial_load_model_only",
                "checkpoint.exclude_from_loading",
                "checkpoint.allow_model_changes",
            ),
        )


def _profiling(config: Config) -> Iterator[Idle]:
    section, steps = config.profiling, config.training.steps
    if not (section.enable_profiling or section.enable_memory_snapshot):
        yield (
            "profiling.enable_profiling and enable_memory_snapshot are false",
            ("profiling.profile_freq",),
        )
    if section.profile_freq > steps:
        yield (
            f"training.steps is {steps}, profiling.profile_freq {section.profile_freq}",
            ("profiling.enable_profiling",),
        )


def _training(config: Config) -> Iterator[Idle]:
    dtype = config.training.param_dtype
    if dtype == "float16":
        yield (
            'param_dtype is "float16", which skips such steps and halves the loss scale',
            ("training.nonfinite",),
        )
    if dtype == "float32":
        yield 'param_dtype is "float32"', ("model.fp32_residual",)


def _parallel(config: Config, dims: ParallelDims) -> Iterator[Idle]:
    training = config.training
    at_once = training.local_batch_size * dims.batch
    if dims.fsdp * dims.dp_replicate == 1:
        yield "no gradient is reduced", ("parallel.gradient_sync",)
    elif dims.pp == 1 and training.global_batch_size in (-1, at_once):
        yield "a step is one micro-batch", ("parallel.gradient_sync",)
    if dims.cp == 1:
        yield "parallel.cp is 1", ("parallel.cp_method",)
    if dims.tp == 1:
        yield "parallel.tp is 1", ("parallel.sequence_parallel", "parallel.loss_parallel")


def _pipeline(config: Config, dims: ParallelDims) -> Iterator[Idle]:
    parallel = config.parallel
    if dims.pp == 1:
        yield "parallel.pp is 1", tuple(f"parallel.{key}" for key in PIPELINE_KEYS)
        return
    if parallel.stages_per_rank != parallel.pp_stages_per_rank:
        yield (
            f"parallel.pp_schedule is {quote(parallel.pp_schedule)}",
            ("parallel.pp_stages_per_rank",),
        )
    yield "a pipeline reduces gradients at the end of each pass", ("parallel.gradient_sync",)
    if parallel.pp_split != "explicit":
        yield f"parallel.pp_split is {quote(parallel.pp_split)}", ("parallel.pp_stage_modules",)


def _compile_and_float8(config: Config, dims: ParallelDims) -> Iterator[Idle]:
    if not config.compile.enable:
        yield "compile.enable is false", ("compile.components",)
    if config.float8.recipe == "none":
        keys = ("fsdp_all_gather", "filter", "min_dim", "emulate")
        yield 'float8.recipe is "none"', tuple(f"float8.{key}" for key in keys)
    elif dims.fsdp == 1:
        yield "nothing is sharded", ("float8.fsdp_all_gather",)


def _activation_checkpoint(config: Config) -> Iterator[Idle]:
    mode = config.activation_checkpoint.mode
    for key, acts_in in MODE_OF.items():
        if mode != acts_in:
            reason = f"activation_checkpoint.mode is {quote(mode)}"
            yield reason, (f"activation_checkpoint.{key}",)


def _data(config: Config, objective: str) -> Iterator[Idle]:
    data = config.data
    # Parts that do not follow are taken from the documents of the buffer, shuffled or not.
    makes_pairs = objective == "masked_lm" and config.masked_lm.next_sentence
    if data.packing != "fixed":
        yield f"data.packing is {quote(data.packing)}", ("data.packing_block",)
    if not data.shuffle and not makes_pairs:
        yield "data.shuffle is false", ("data.shuffle_buffer",)
    if data.dataset_path:
        yield "data.dataset_path is set", ("data.dataset", "data.subset")
    elif data.dataset == "bundled":
        yield 'data.dataset is "bundled"', ("data.subset",)


def _validation(config: Config) -> Iterator[Idle]:
    section = config.validation
    if not section.enable:
        keys = (key for key in FIELDS["validation"] if key != "enable")
        yield "validation.enable is false", tuple(f"validation.{key}" for key in keys)
    elif section.dataset_path:
        yield "validation.dataset_path is set", ("validation.dataset",)


def _optimizer(config: Config) -> Iterator[Idle]:
    if config.optimizer.weight_decay == 0:
        yield "weight_decay is 0", ("optimizer.no_decay",)
    if config.lr_scheduler.decay_type == "constant":
        yield (
            'decay_type is "constant"',
            ("lr_scheduler.decay_ratio", "lr_scheduler.min_lr_factor"),
        )


def _idle_saved_ops(loaded: LoadedConfig, attention_dropout: float) -> Iterator[str]:
    """Operations that somebody asked to save and that this run does not have."""
    config, key = loaded.config, "activation_checkpoint.save"
    if config.activation_checkpoint.mode != "selective_op" or loaded.origins[key] == DEFAULT:
        return
    tp, sequence_parallel = config.parallel.tp, config.parallel.sequence_parallel
    recipe = config.float8.recipe
    missing = {
        "attention": (attention_dropout > 0, f"attention_dropout is {attention_dropout:g}"),
        "reduce_scatter": (
            tp == 1 or not sequence_parallel,
            f"parallel.tp is {tp}, sequence_parallel {str(sequence_parallel).lower()}",
        ),
        "all_reduce": (
            tp == 1 or (sequence_parallel and recipe != "tensorwise"),
            f"parallel.tp is {tp}, sequence_parallel {str(sequence_parallel).lower()}",
        ),
        "max": (recipe != "tensorwise", f"float8.recipe is {quote(recipe)}"),
    }
    for name in config.activation_checkpoint.save:
        is_missing, reason = missing.get(name, (False, ""))
        if is_missing:
            yield f"{key} ({loaded.origins[key]}): {quote(name)} cannot act: {reason}"
