"""What a configuration may ask for as a whole: rules between keys, checked before any start."""

import glob
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from titan_lite.config.dims import ParallelDims
from titan_lite.config.load import DEFAULT, ConfigError, LoadedConfig, Problem
from titan_lite.config.problems import FIELDS, near_file, quote
from titan_lite.config.schema import Config, Parallel

logger = logging.getLogger("titan_lite.config")

# Steps at the end of a period that the profiler records (profiling.profile_freq).
PROFILED_STEPS = 3
DEGREES = tuple(f"parallel.{axis}" for axis in ParallelDims.AXES)

# The keys that a rule reads, the one to blame first, and what is wrong with them.
Broken = tuple[tuple[str, ...], str]


def check(loaded: LoadedConfig, world_size: int) -> ParallelDims:
    """The degrees of the run, after checking the configuration against itself and the world size.

    Settings that cannot act are logged as warnings. Raises ConfigError with every problem of
    loading and every broken rule between keys that are not in doubt.
    """
    config = loaded.config
    broken = [
        *_single(config),
        *_files(config),
        *_activation_checkpoint(config),
        *_async_tp(config),
    ]
    dims = None
    if loaded.in_doubt.isdisjoint(DEGREES):
        try:
            dims = ParallelDims.resolve(config.parallel, world_size)
        except ValueError as error:
            broken.append(((_degree_to_blame(loaded),), str(error)))
    broken += _layout(config, dims)
    if dims is not None:
        broken += _float8(config, dims)
    problems = [
        *loaded.problems,
        *(
            Problem(keys[0], loaded.origins[keys[0]], message)
            for keys, message in broken
            if loaded.in_doubt.isdisjoint(keys)
        ),
    ]
    if dims is None or problems:
        raise ConfigError(problems)
    for warning in warnings(loaded, dims):
        logger.warning("%s", warning)
    return dims


def warnings(loaded: LoadedConfig, dims: ParallelDims) -> list[str]:
    """A sentence for each setting that was made but cannot act, or wastes work, in this run."""
    return [*_wasteful(loaded.config, dims), *_idle(loaded, dims)]


def _degree_to_blame(loaded: LoadedConfig) -> str:
    """The key to blame for a wrong product of degrees: the last one that somebody set."""
    given = [key for key in DEGREES if loaded.origins[key] != DEFAULT]
    return given[-1] if given else "parallel.dp_shard"


def _single(config: Config) -> Iterator[Broken]:
    """Rules that need no world size."""
    training, parallel = config.training, config.parallel
    if parallel.pp > 1:
        yield (
            ("parallel.pp",),
            f"{parallel.pp}: pipeline parallel is not available in this version; use 1",
        )
    yield from _sequence(training.seq_len, parallel)
    if parallel.tp > 1 and isinstance(parallel.reshard_after_forward, int):
        yield (
            ("parallel.reshard_after_forward", "parallel.tp"),
            f"{parallel.reshard_after_forward}: FSDP2 does not regroup parameters that "
            f'parallel.tp ({parallel.tp}) has split; use "always" or "never"',
        )
    if training.param_dtype != "float16" and training.reduce_dtype == "float16":
        yield (
            ("training.reduce_dtype", "training.param_dtype"),
            '"float16" gradients vanish without loss scaling, which comes with param_dtype = '
            f'"float16"; param_dtype is {quote(training.param_dtype)}',
        )
    for beta in ("beta1", "beta2"):
        if getattr(config.optimizer, beta) == 1:
            yield (f"optimizer.{beta}",), "1 never forgets, and divides by zero; use less than 1"
    load_step = config.checkpoint.load_step
    if isinstance(load_step, int) and load_step > 0:
        if not config.checkpoint.enable:
            yield (
                ("checkpoint.load_step", "checkpoint.enable"),
                f"{load_step} cannot be loaded: checkpoint.enable is false",
            )
        if load_step >= training.steps:
            yield (
                ("checkpoint.load_step", "training.steps"),
                f"{load_step} leaves nothing to train: training.steps is {training.steps}",
            )
    profiling = config.profiling
    if profiling.enable_profiling and profiling.profile_freq < PROFILED_STEPS:
        yield (
            ("profiling.profile_freq", "profiling.enable_profiling"),
            f"{profiling.profile_freq} is shorter than the {PROFILED_STEPS} steps recorded "
            "in each period",
        )


def _sequence(seq_len: int, parallel: Parallel) -> Iterator[Broken]:
    """The parts of a sequence that ranks hold are equal."""
    cp, tp = parallel.cp, parallel.tp
    if cp > 1 and parallel.cp_method == "ulysses" and seq_len % cp:
        yield (
            ("training.seq_len", "parallel.cp", "parallel.cp_method"),
            f"{seq_len} is not divisible by parallel.cp ({cp})",
        )
    elif cp > 1 and parallel.cp_method != "ulysses" and seq_len % (2 * cp):
        yield (
            ("training.seq_len", "parallel.cp", "parallel.cp_method"),
            f"{seq_len} is not divisible by 2 x parallel.cp ({cp}) = {2 * cp}",
        )
    elif tp > 1 and (seq_len // cp) % tp:
        local = f" / parallel.cp ({cp}) = {seq_len // cp}" if cp > 1 else ""
        yield (
            ("training.seq_len", "parallel.tp", "parallel.cp"),
            f"{seq_len}{local} is not divisible by parallel.tp ({tp})",
        )


def _activation_checkpoint(config: Config) -> Iterator[Broken]:
    """What the modes of activation checkpointing need."""
    section = config.activation_checkpoint
    if section.mode == "memory_budget":
        if not config.compile.covers("model"):
            yield (
                ("activation_checkpoint.mode",),
                '"memory_budget" is kept by the compiler: set compile.enable = true and '
                'compile.components = ["model"], or use "selective_op"',
            )
        if config.parallel.tp > 1:
            yield (
                ("activation_checkpoint.mode",),
                '"memory_budget": the compiler cannot tell the sizes of tensor-parallel '
                f'activations (parallel.tp is {config.parallel.tp}); use "selective_op"',
            )
        if section.memory_budget == 1:
            yield (
                ("activation_checkpoint.memory_budget",),
                '1 recomputes nothing: use less, or mode = "none"',
            )
    if section.mode == "selective_op" and not section.save:
        yield ("activation_checkpoint.save",), 'names nothing to save: use mode = "full"'
    if section.mode == "selective_op" and {"matmul", "every_second_matmul"} <= {*section.save}:
        yield (
            ("activation_checkpoint.save",),
            'holds both "matmul" and "every_second_matmul"; use one of the two',
        )


def _async_tp(config: Config) -> Iterator[Broken]:
    """What async tensor parallel is made of."""
    parallel = config.parallel
    needs = (
        (not config.compile.enable, "compile.enable = true"),
        ("model" not in config.compile.components, 'compile.components = ["model"]'),
        (parallel.tp == 1, "parallel.tp > 1"),
        (not parallel.sequence_parallel, "parallel.sequence_parallel = true"),
    )
    missing = [words for is_missing, words in needs if is_missing]
    if parallel.async_tp and missing:
        yield (
            ("parallel.async_tp",),
            "the compiler overlaps the gathers and scatters of sequence parallel with matmuls: "
            f"set {' and '.join(missing)}",
        )


def _files(config: Config) -> Iterator[Broken]:
    """Paths that must exist, or must not."""
    data = config.data
    # os.path.exists: unlike Path's, it answers for a name that no file can have.
    dataset = os.path.expanduser(data.dataset_path)  # noqa: PTH111
    found = os.path.exists(dataset)  # noqa: PTH110
    # Path.glob refuses absolute patterns.
    if dataset and not (found or glob.glob(dataset, recursive=True)):  # noqa: PTH207
        message = f"no such file: {quote(data.dataset_path)}{near_file(Path(dataset))}"
        yield ("data.dataset_path",), message
    tokenizer = os.path.expanduser(data.tokenizer_path)  # noqa: PTH111
    if os.path.isdir(tokenizer):  # noqa: PTH112
        message = f"a folder, where a file is expected: {quote(data.tokenizer_path)}"
        yield ("data.tokenizer_path",), message
    elif tokenizer and not os.path.isfile(tokenizer):  # noqa: PTH113
        message = f"no such file: {quote(data.tokenizer_path)}{near_file(Path(tokenizer))}"
        yield ("data.tokenizer_path",), message
    dump_folder = Path(config.job.dump_folder)
    for folder in map(str, (dump_folder, *dump_folder.parents)):
        if os.path.exists(folder):  # noqa: PTH110
            if not os.path.isdir(folder):  # noqa: PTH112
                yield ("job.dump_folder",), f"cannot be made: {quote(folder)} is a file"
            elif not os.access(folder, os.W_OK | os.X_OK):
                message = f"cannot be written: no permission to write in {quote(folder)}"
                yield ("job.dump_folder",), message
            break


def _layout(config: Config, dims: ParallelDims | None) -> Iterator[Broken]:
    """Rules between the degrees and the other keys; without degrees, what holds for all of them."""
    training = config.training
    batch_keys = ("training.global_batch_size", "training.local_batch_size")
    if dims is None:
        if training.global_batch_size != -1 and (
            training.global_batch_size % training.local_batch_size
        ):
            yield (
                batch_keys,
                f"{training.global_batch_size} is not a multiple of local_batch_size "
                f"({training.local_batch_size})",
            )
        return
    micro = training.local_batch_size * dims.batch
    if training.global_batch_size != -1 and training.global_batch_size % micro:
        yield (
            batch_keys,
            f"{training.global_batch_size} is not a multiple of local_batch_size "
            f"({training.local_batch_size}) x data-parallel degree ({dims.batch}) = {micro}",
        )
    reshard = config.parallel.reshard_after_forward
    if isinstance(reshard, int) and not (1 < reshard < dims.fsdp and dims.fsdp % reshard == 0):
        sizes = [n for n in range(2, dims.fsdp) if dims.fsdp % n == 0]
        use = f"use one of {', '.join(map(str, sizes))}" if sizes else 'use "always" or "never"'
        yield (
            ("parallel.reshard_after_forward",),
            f"{reshard} ranks are no smaller group that divides the {dims.fsdp} over which FSDP "
            f"shards; {use}",
        )


def _float8(config: Config, dims: ParallelDims) -> Iterator[Broken]:
    """What torchao's float8 linears and their gathers cannot do in any model."""
    float8, training, parallel = config.float8, config.training, config.parallel
    tokens = training.local_batch_size * training.seq_len // dims.cp
    # Of the three products of a linear, that of the weight gradient sums over the tokens.
    if float8.recipe in ("tensorwise", "rowwise") and tokens % 16:
        yield (
            ("training.seq_len",),
            f"local_batch_size ({training.local_batch_size}) x seq_len ({training.seq_len}) / "
            f"cp ({dims.cp}) = {tokens} tokens is not divisible by 16, as float8 matrix products "
            'need; float8.recipe = "rowwise_gw_hp" does not sum over tokens in float8',
        )
    if not float8.fsdp_all_gather:
        return
    key = "float8.fsdp_all_gather"
    if float8.recipe.startswith("rowwise"):
        yield (
            (key,),
            f"a weight gathered in float8 has one scale, recipe {quote(float8.recipe)} needs one "
            'per row; use recipe "tensorwise"',
        )
    if isinstance(parallel.reshard_after_forward, int):
        yield (
            (key,),
            "FSDP gathers no float8 weights from the smaller groups of "
            f"parallel.reshard_after_forward ({parallel.reshard_after_forward}); use "
            '"always" or "never"',
        )
    if parallel.cpu_offload:
        yield (
            (key,),
            "the scales are lost when parallel.cpu_offload copies a weight to the device; "
            "use one of the two",
        )


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
    profiling, data = config.profiling, config.data
    mode = config.activation_checkpoint.mode
    off = (
        (
            not config.checkpoint.enable,
            "checkpoint.enable is false",
            ("checkpoint.folder", "checkpoint.interval", "checkpoint.keep_latest_k"),
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
        (dims.fsdp == 1, "nothing is sharded", ("parallel.reshard_after_forward",)),
        (dims.cp == 1, "parallel.cp is 1", ("parallel.cp_method",)),
        (
            dims.tp == 1,
            "parallel.tp is 1",
            ("parallel.sequence_parallel", "parallel.loss_parallel"),
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
        (not data.shuffle, "data.shuffle is false", ("data.shuffle_buffer",)),
        (bool(data.dataset_path), "data.dataset_path is set", ("data.dataset", "data.subset")),
        (
            data.dataset == "bundled" and not data.dataset_path,
            'data.dataset is "bundled"',
            ("data.subset",),
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
        "all_reduce": (tp == 1, "parallel.tp is 1"),
        "max": (recipe != "tensorwise", f"float8.recipe is {quote(recipe)}"),
    }
    for name in config.activation_checkpoint.save:
        is_missing, reason = missing.get(name, (False, ""))
        if is_missing:
            yield f"{key} ({loaded.origins[key]}): {quote(name)} cannot act: {reason}"
