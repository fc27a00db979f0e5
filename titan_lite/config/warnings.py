"""Settings that were made but cannot act, or waste work: a sentence for each."""

from collections.abc import Iterator

from titan_lite.config.dims import ParallelDims
from titan_lite.config.load import DEFAULT, LoadedConfig
from titan_lite.config.problems import FIELDS, quote
from titan_lite.config.schema import Config

PIPELINE_KEYS = (
    "pp_schedule",
    "pp_stages_per_rank",
    "pp_micro_batches",
    "pp_split",
    "pp_stage_modules",
)


def find_warnings(loaded: LoadedConfig, dims: ParallelDims) -> list[str]:
    """A sentence for each setting that was made but cannot act, or wastes work, in this run."""
    return [*_wasteful(loaded.config, dims), *_idle(loaded, dims)]


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


def _idle(loaded: LoadedConfig, dims: ParallelDims) -> Iterator[str]:
    """Keys that somebody changed and another key switches off."""
    config = loaded.config
    profiling, data, training = config.profiling, config.data, config.training
    validation = config.validation
    mode = config.activation_checkpoint.mode
    off = (
        (
            not config.checkpoint.enable,
            "checkpoint.enable is false",
            tuple(
                f"checkpoint.{key}"
                for key in FIELDS["checkpoint"]
                if key not in ("enable", "load_step", "initial_load_path", "initial_load_hf")
            ),
        ),
        (
            config.checkpoint.enable and config.checkpoint.keep_latest_k == 0,
            "checkpoint.keep_latest_k = 0 keeps all",
            ("checkpoint.keep_every",),
        ),
        (
            config.checkpoint.enable and not config.checkpoint.last_save_model_only,
            "checkpoint.last_save_model_only is false",
            ("checkpoint.export_dtype",),
        ),
        (
            config.checkpoint.enable and not config.checkpoint.initial_load_path,
            "checkpoint.initial_load_path is not set",
            ("checkpoint.initial_load_model_only", "checkpoint.exclude_from_loading"),
        ),
        (
            not (profiling.enable_profiling or profiling.enable_memory_snapshot),
            "profiling.enable_profiling and enable_memory_snapshot are false",
            ("profiling.profile_freq",),
        ),
        (
            profiling.profile_freq > config.training.steps,
            f"training.steps is {config.training.steps}, profiling.profile_freq "
            f"{profiling.profile_freq}",
            ("profiling.enable_profiling",) if profiling.enable_profiling else (),
        ),
        (
            config.training.param_dtype == "float16",
            'param_dtype is "float16", which skips such steps and halves the loss scale',
            ("training.nonfinite",),
        ),
        (dims.fsdp == 1, "nothing is sharded", ("parallel.reshard_after_forward",)),
        (
            dims.fsdp == 1 and config.float8.recipe != "none",
            "nothing is sharded",
            ("float8.fsdp_all_gather",),
        ),
        (
            dims.fsdp * dims.dp_replicate == 1,
            "no gradient is reduced",
            ("parallel.gradient_sync",),
        ),
        (
            dims.pp == 1
            and dims.fsdp * dims.dp_replicate > 1
            and training.global_batch_size in (-1, training.local_batch_size * dims.batch),
            "a step is one micro-batch",
            ("parallel.gradient_sync",),
        ),
        (training.param_dtype == "float32", 'param_dtype is "float32"', ("model.fp32_residual",)),
        (dims.cp == 1, "parallel.cp is 1", ("parallel.cp_method",)),
        (
            dims.tp == 1,
            "parallel.tp is 1",
            ("parallel.sequence_parallel", "parallel.loss_parallel"),
        ),
        (
            dims.pp == 1,
            "parallel.pp is 1",
            tuple(f"parallel.{key}" for key in PIPELINE_KEYS),
        ),
        (
            dims.pp > 1 and config.parallel.stages_per_rank != config.parallel.pp_stages_per_rank,
            f"parallel.pp_schedule is {quote(config.parallel.pp_schedule)}",
            ("parallel.pp_stages_per_rank",),
        ),
        (
            dims.pp > 1,
            "a pipeline reduces gradients at the end of each pass",
            ("parallel.gradient_sync",),
        ),
        (
            dims.pp > 1 and config.parallel.pp_split != "explicit",
            f"parallel.pp_split is {quote(config.parallel.pp_split)}",
            ("parallel.pp_stage_modules",),
        ),
        (not config.compile.enable, "compile.enable is false", ("compile.components",)),
        (
            config.float8.recipe == "none",
            'float8.recipe is "none"',
            tuple(f"float8.{key}" for key in ("fsdp_all_gather", "filter", "min_dim", "emulate")),
        ),
        *(
            (
                mode != of_mode,
                f"activation_checkpoint.mode is {quote(mode)}",
                (f"activation_checkpoint.{key}",),
            )
            for key, of_mode in (
                ("every_nth", "every_nth"),
                ("first_k", "first_k"),
                ("fraction", "fraction"),
                ("save", "selective_op"),
                ("memory_budget", "memory_budget"),
            )
        ),
        (
            data.packing != "fixed",
            f"data.packing is {quote(data.packing)}",
            ("data.packing_block",),
        ),
        (not data.shuffle, "data.shuffle is false", ("data.shuffle_buffer",)),
        (bool(data.dataset_path), "data.dataset_path is set", ("data.dataset", "data.subset")),
        (
            data.dataset == "bundled" and not data.dataset_path,
            'data.dataset is "bundled"',
            ("data.subset",),
        ),
        (
            not validation.enable,
            "validation.enable is false",
            tuple(f"validation.{key}" for key in FIELDS["validation"] if key != "enable"),
        ),
        (
            validation.enable and bool(validation.dataset_path),
            "validation.dataset_path is set",
            ("validation.dataset",),
        ),
        (config.optimizer.weight_decay == 0, "weight_decay is 0", ("optimizer.no_decay",)),
        (
            config.lr_scheduler.decay_type == "constant",
            'decay_type is "constant"',
            ("lr_scheduler.decay_ratio", "lr_scheduler.min_lr_factor"),
        ),
    )
    for is_off, reason, keys in off:
        for key in keys:
            section, _, name = key.partition(".")
            value = getattr(getattr(config, section), name)
            if is_off and value != FIELDS[section][name].default:
                yield f"{key} ({loaded.origins[key]}) cannot act: {reason}"
    yield from _idle_saved_ops(loaded)


def _idle_saved_ops(loaded: LoadedConfig) -> Iterator[str]:
    """Operations that somebody asked to save and that this run does not have."""
    config, key = loaded.config, "activation_checkpoint.save"
    if config.activation_checkpoint.mode != "selective_op" or loaded.origins[key] == DEFAULT:
        return
    tp, sequence_parallel = config.parallel.tp, config.parallel.sequence_parallel
    recipe = config.float8.recipe
    missing = {
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
