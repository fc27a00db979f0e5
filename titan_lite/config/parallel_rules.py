"""Rules between the parallel layout and the rest of the configuration."""

from collections.abc import Iterator

from titan_lite.config.activation_checkpoint import MemoryBudget, SelectiveOp
from titan_lite.config.dims import ParallelDims, resolve_global_batch
from titan_lite.config.problems import SettingError, one_of, quote
from titan_lite.config.schema import Config, Parallel


def parallel_rules(config: Config, dims: ParallelDims | None) -> Iterator[SettingError]:
    """Yields all broken rules; without dims, only of the rules that do not depend on them."""
    parallel = config.parallel
    yield from _sequence(config.training.seq_len, parallel)
    if parallel.cp > 1 and parallel.cp_method == "ring" and config.data.masks_attention:
        yield SettingError(
            ("parallel.cp", "parallel.cp_method", "data.packing"),
            f"data.packing = {quote(config.data.packing)} keeps attention inside documents, which "
            'parallel.cp_method = "ring" does not support; set parallel.cp_method = "ulysses" or '
            '"all_gather"',
        )
    yield from _attention(config)
    yield from _activation_checkpoint(config)
    yield from _async_tp(config)
    if parallel.fsdp_symm_mem and parallel.async_tp:
        yield SettingError(
            ("parallel.async_tp", "parallel.fsdp_symm_mem"),
            "fsdp_symm_mem = true cannot be combined with parallel.async_tp = true: a process can "
            "use the symmetric memory of NCCL or of CUDA, not both; set one of the two to false",
        )
    if parallel.tp > 1 and isinstance(parallel.reshard_after_forward, int):
        yield SettingError(
            ("parallel.tp", "parallel.reshard_after_forward"),
            f"reshard_after_forward = {parallel.reshard_after_forward}, an integer, cannot be "
            f"combined with parallel.tp ({parallel.tp}): FSDP2 cannot reshard tensor-parallel "
            'parameters over smaller groups; set parallel.reshard_after_forward = "always" or '
            '"never"',
        )
    if parallel.pp > 1:
        yield from _stages(config)
    yield from _layout(config, dims)
    if dims is not None:
        yield from _float8(config, dims)


def _attention(config: Config) -> Iterator[SettingError]:
    """Unsupported features of each attention kernel."""
    kernel, key = config.attention.kernel, "attention.kernel"
    setting = f"{key} = {quote(kernel)}"
    parallel, training, packing = config.parallel, config.training, config.data.packing
    if kernel not in ("auto", "math") and training.param_dtype == "float32":
        yield SettingError(
            ("training.param_dtype", key),
            f'{setting} does not support training.param_dtype = "float32"; set '
            'training.param_dtype = "bfloat16", or attention.kernel = "math"',
        )
    if kernel == "cudnn" and config.data.masks_attention:
        yield SettingError(
            ("data.packing", key),
            f"{setting} does not support attention inside documents (data.packing = "
            f'{quote(packing)}); set attention.kernel = "flash2"',
        )
    if kernel == "cudnn" and training.deterministic:
        yield SettingError(
            ("training.deterministic", key),
            f"{setting} is not deterministic; set training.deterministic = false, or "
            'attention.kernel = "flash2"',
        )
    merges = parallel.cp > 1 and parallel.cp_method != "ulysses"
    if kernel == "math" and merges and not config.data.masks_attention:
        yield SettingError(
            ("data.packing", "parallel.cp", "parallel.cp_method", key),
            f"{setting} returns no log-sum-exp, which parallel.cp_method = "
            f'{quote(parallel.cp_method)} requires; set parallel.cp_method = "ulysses"',
        )


def _stages(config: Config) -> Iterator[SettingError]:
    """Checks the stages against the pipeline schedule."""
    parallel, schedule = config.parallel, quote(config.parallel.pp_schedule)
    if parallel.schedule.splits_backward and config.compile.covers("model"):
        yield SettingError(
            ("parallel.pp", "compile.components", "compile.enable", "parallel.pp_schedule"),
            f"pp_schedule = {schedule} computes input and weight gradients separately, "
            "which torch does not support for compiled blocks; set parallel.pp_schedule = "
            '"Interleaved1F1B", or compile.enable = false',
        )
    if parallel.schedule.splits_backward and config.activation_checkpoint.mode == "selective_op":
        yield SettingError(
            ("parallel.pp", "activation_checkpoint.mode", "parallel.pp_schedule"),
            f"pp_schedule = {schedule} computes input and weight gradients in two "
            'backward passes, but torch can recompute a "selective_op" block for one of them only; '
            'set activation_checkpoint.mode = "full"',
        )
    if parallel.pp_split == "explicit":
        stages, needed = parallel.pp_stage_modules, parallel.num_stages
        if len(stages) != needed or not all(stages):
            empty = sum(not modules for modules in stages)
            yield SettingError(
                (
                    *("parallel.pp", "parallel.pp_schedule", "parallel.pp_stages_per_rank"),
                    *("parallel.pp_split", "parallel.pp_stage_modules"),
                ),
                'pp_split = "explicit" requires parallel.pp_stage_modules to list '
                f"{needed} stages ({schedule} on {parallel.pp} ranks), each with at least one "
                f"module; it lists {len(stages)}{f', {empty} without a module' if empty else ''}",
            )


def _micro_batches(
    config: Config, micro_steps: int, words: str, samples: int
) -> Iterator[SettingError]:
    """Checks the number of micro-batches against the pipeline schedule.

    words: `micro_steps` and where it comes from. samples: of one micro-batch, over all ranks.
    """
    parallel, pp = config.parallel, config.parallel.pp
    of_step = ("parallel.pp", "training.local_batch_size", "training.global_batch_size")
    count = parallel.micro_batches_per_pass(micro_steps)
    if micro_steps % count:
        yield SettingError(
            (*of_step, "parallel.pp_micro_batches"),
            f"pp_micro_batches ({count}) must divide the number of micro-batches of a step: "
            f"{words}",
        )
        return
    least = max(1, parallel.schedule.min_per_rank * pp)
    multiple = pp if parallel.schedule.multiple_of_ranks else 1
    if count < least or count % multiple:
        fits = f"at least {least}" if count < least else f"a multiple of {multiple}"
        needed = (
            f"with parallel.pp = {pp}, {quote(parallel.pp_schedule)} requires {fits} micro-batches"
        )
        if parallel.pp_micro_batches != -1:
            yield SettingError(
                (*of_step, "parallel.pp_schedule", "parallel.pp_micro_batches"),
                f"{needed} in a pass, but parallel.pp_micro_batches is {count}; set it to -1 (all "
                f"{micro_steps} of a step), or to a divisor of {micro_steps} that is {fits}",
            )
            return
        enough = -(-max(count, least) // multiple) * multiple
        change = f"training.global_batch_size = {enough * samples}"
        # With -1, a smaller micro-batch would make the global batch smaller as well.
        local_batch, rest = divmod(config.training.local_batch_size * count, enough)
        if config.training.global_batch_size != -1 and not rest:
            change += f" or training.local_batch_size = {local_batch}"
        yield SettingError(
            ("parallel.pp_schedule", *of_step),
            f"{needed} per step, got {words}; set {change}",
        )


def _sequence(seq_len: int, parallel: Parallel) -> Iterator[SettingError]:
    """Checks that ranks have equal parts of a sequence."""
    cp, tp = parallel.cp, parallel.tp
    keys = ("parallel.cp", "parallel.cp_method", "training.seq_len")
    if cp > 1 and parallel.cp_method == "ulysses" and seq_len % cp:
        yield SettingError(keys, f"seq_len ({seq_len}) must be a multiple of parallel.cp ({cp})")
    elif cp > 1 and parallel.cp_method != "ulysses" and seq_len % (2 * cp):
        yield SettingError(
            keys, f"seq_len ({seq_len}) must be a multiple of 2 x parallel.cp ({cp}) = {2 * cp}"
        )
    elif tp > 1 and (seq_len // cp) % tp:
        local = f" / parallel.cp ({cp}) = {seq_len // cp}" if cp > 1 else ""
        yield SettingError(
            ("parallel.cp", "parallel.tp", "training.seq_len"),
            f"seq_len ({seq_len}){local} must be a multiple of parallel.tp ({tp})",
        )


def _activation_checkpoint(config: Config) -> Iterator[SettingError]:
    """Requirements of the activation checkpointing modes."""
    section = config.activation_checkpoint
    if isinstance(section, MemoryBudget):
        if not config.compile.covers("model"):
            yield SettingError(
                ("compile.components", "compile.enable", "activation_checkpoint.mode"),
                'activation_checkpoint.mode = "memory_budget" is a feature of the compiler: set '
                'compile.enable = true and compile.components = ["model"], or '
                'activation_checkpoint.mode = "selective_op"',
            )
        if config.parallel.tp > 1:
            yield SettingError(
                ("parallel.tp", "activation_checkpoint.mode"),
                'activation_checkpoint.mode = "memory_budget" cannot be combined with parallel.tp '
                f"({config.parallel.tp}): the compiler does not know the sizes of tensor-parallel "
                'activations; set activation_checkpoint.mode = "selective_op"',
            )
    if isinstance(section, SelectiveOp) and not section.save:
        yield SettingError(
            "activation_checkpoint.save",
            'names no operation: name one, or set activation_checkpoint.mode = "full"',
        )
    if {"matmul", "every_second_matmul"} <= {*section.saved_ops}:
        yield SettingError(
            "activation_checkpoint.save",
            'cannot have both "matmul" and "every_second_matmul"; remove one of the two',
        )


def _async_tp(config: Config) -> Iterator[SettingError]:
    """Requirements of async tensor parallel."""
    parallel = config.parallel
    needs = (
        (not config.compile.enable, "compile.enable", "= true"),
        ("model" not in config.compile.components, "compile.components", '= ["model"]'),
        (parallel.tp == 1, "parallel.tp", "> 1"),
        (not parallel.sequence_parallel, "parallel.sequence_parallel", "= true"),
    )
    missing = {key: words for is_missing, key, words in needs if is_missing}
    if parallel.async_tp and missing:
        yield SettingError(
            (*missing, "parallel.async_tp"),
            "async_tp = true requires "
            f"{' and '.join(f'{key} {words}' for key, words in missing.items())}",
        )


def _layout(config: Config, dims: ParallelDims | None) -> Iterator[SettingError]:
    """Rules between degrees and other keys; without dims, only those that do not depend on them."""
    training = config.training
    if dims is None:
        if training.global_batch_size != -1 and (
            training.global_batch_size % training.local_batch_size
        ):
            yield SettingError(
                ("training.local_batch_size", "training.global_batch_size"),
                f"global_batch_size ({training.global_batch_size}) must be a multiple of "
                f"training.local_batch_size ({training.local_batch_size})",
            )
        return
    micro = training.local_batch_size * dims.batch
    if training.global_batch_size != -1 and training.global_batch_size % micro:
        yield SettingError(
            (
                *("parallel.dp_shard", "parallel.dp_replicate"),
                *("training.local_batch_size", "training.global_batch_size"),
            ),
            f"global_batch_size ({training.global_batch_size}) must be a multiple of "
            f"training.local_batch_size ({training.local_batch_size}) x data-parallel degree "
            f"({dims.batch}) = {micro} {dims.at_world_size}",
        )
    elif config.parallel.pp > 1:
        samples = resolve_global_batch(
            training.global_batch_size, training.local_batch_size, dims.batch
        )
        words = "1, because training.global_batch_size is -1"
        if training.global_batch_size != -1:
            words = (
                f"{samples // micro} = global_batch_size ({samples}) / (local_batch_size "
                f"({training.local_batch_size}) x data-parallel degree ({dims.batch} at world size "
                f"{dims.world_size}))"
            )
        yield from _micro_batches(config, samples // micro, words, micro)
    reshard = config.parallel.reshard_after_forward
    if config.parallel.tp > 1 or not isinstance(reshard, int):
        return
    if not (1 < reshard < dims.fsdp and dims.fsdp % reshard == 0):
        sizes = [n for n in range(2, dims.fsdp) if dims.fsdp % n == 0]
        use = one_of([str(size) for size in sizes] or ['"always"', '"never"'])
        yield SettingError(
            ("parallel.dp_shard", "parallel.cp", "parallel.reshard_after_forward"),
            f"reshard_after_forward ({reshard}) must be above 1, below the FSDP degree and divide "
            f"it; the FSDP degree is {dims.fsdp} {dims.at_world_size}: use {use}",
        )


def _float8(config: Config, dims: ParallelDims) -> Iterator[SettingError]:
    """Limits of torchao's float8 linears and of their gathers."""
    float8, training, parallel = config.float8, config.training, config.parallel
    tokens = training.local_batch_size * training.seq_len // dims.cp
    # The matmul of a linear's weight gradient sums over the tokens.
    if float8.recipe in ("tensorwise", "rowwise") and tokens % 16:
        yield SettingError(
            ("parallel.cp", "float8.recipe", "training.local_batch_size", "training.seq_len"),
            f"training.local_batch_size ({training.local_batch_size}) x training.seq_len "
            f"({training.seq_len}) / parallel.cp ({dims.cp}) = {tokens} tokens must be divisible "
            'by 16 for float8 matrix products; or set float8.recipe = "rowwise_gw_hp", which does '
            "not sum over tokens in float8",
        )
    if not float8.fsdp_all_gather:
        return
    key = "float8.fsdp_all_gather"
    if float8.recipe.startswith("rowwise"):
        yield SettingError(
            ("float8.recipe", key),
            "fsdp_all_gather = true is not supported by float8.recipe = "
            f"{quote(float8.recipe)}, which has one scale per row; set float8.recipe = "
            '"tensorwise", or float8.fsdp_all_gather = false',
        )
    if isinstance(parallel.reshard_after_forward, int):
        yield SettingError(
            ("parallel.reshard_after_forward", key),
            "fsdp_all_gather = true is not supported with parallel.reshard_after_forward = "
            f"{parallel.reshard_after_forward}; set parallel.reshard_after_forward = "
            '"always" or "never", or float8.fsdp_all_gather = false',
        )
    if parallel.cpu_offload:
        yield SettingError(
            ("parallel.cpu_offload", key),
            "fsdp_all_gather = true cannot be combined with parallel.cpu_offload = true, whose "
            "copies lose the scales; set one of the two to false",
        )
