"""Rules between keys, checked before any process starts."""

import glob
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

from titan_lite.config.dims import ParallelDims
from titan_lite.config.optimizers import EIGHT_BITS, AdamOptimizer, Optimizer
from titan_lite.config.parallel_rules import parallel_rules
from titan_lite.config.problems import (
    SettingError,
    brace_hint,
    how_to_fetch,
    literal,
    near_file,
    one_of,
    quote,
)
from titan_lite.config.schema import Config, Documents, LRScheduler

# Steps at the end of a period that the profiler records (profiling.profile_freq).
PROFILED_STEPS = 3
# The largest decay of a moment in bfloat16: changes of 1 % per step are larger than the rounding.
MAX_ROUNDED_BETA = 0.99


def config_rules(config: Config, dims: ParallelDims | None) -> Iterator[SettingError]:
    """Yields all broken rules; without dims, only of the rules that do not depend on them."""
    yield from _single(config)
    yield from _documents(config)
    yield from parallel_rules(config, dims)


def _single(config: Config) -> Iterator[SettingError]:
    """Rules that need no world size."""
    training = config.training
    if training.param_dtype != "float16" and training.reduce_dtype == "float16":
        yield SettingError(
            ("training.param_dtype", "training.reduce_dtype"),
            'reduce_dtype = "float16" is not supported with training.param_dtype = '
            f'{quote(training.param_dtype)}: only param_dtype = "float16" has loss scaling; set '
            'training.reduce_dtype = "float32"',
        )
    block, seq_len = config.data.packing_block, training.seq_len
    if config.data.packing == "fixed" and (seq_len % block or seq_len == block):
        yield SettingError(
            ("training.seq_len", "data.packing_block", "data.packing"),
            f'data.packing = "fixed" requires data.packing_block ({block}) to divide '
            f"training.seq_len ({seq_len}) into at least 2 blocks; if a sample is to be one block, "
            'set data.packing = "concat"',
        )
    yield from _groups(config.optimizer)
    yield from _rounded_moments(config.optimizer)
    yield from _decay(config.lr_scheduler, training.steps)
    yield from _checkpoint(config)
    profiling = config.profiling
    if profiling.enable_profiling and profiling.profile_freq < PROFILED_STEPS:
        yield SettingError(
            ("profiling.enable_profiling", "profiling.profile_freq"),
            f"profile_freq ({profiling.profile_freq}) must be at least {PROFILED_STEPS}, the steps "
            "recorded in each period",
        )
    if config.metrics.enable_wandb and (problem := _wandb_problem()):
        yield SettingError("metrics.enable_wandb", problem)


def _rounded_moments(section: Optimizer) -> Iterator[SettingError]:
    """Checks that changes of moments per step are larger than the rounding of bfloat16."""
    if isinstance(section, AdamOptimizer) and section.state_dtype == "bfloat16":
        for key in ("beta1", "beta2"):
            if (beta := getattr(section, key)) > MAX_ROUNDED_BETA:
                yield SettingError(
                    ("optimizer.state_dtype", f"optimizer.{key}"),
                    f"{key} ({beta:g}) must be at most {MAX_ROUNDED_BETA} with "
                    'optimizer.state_dtype = "bfloat16", which cannot store changes of a '
                    "moment below 1/256 of it",
                )


def _decay(section: LRScheduler, steps: int) -> Iterator[SettingError]:
    """Broken rules of the decay's start and length."""
    start, length, warmup = section.decay_start, section.decay_steps, section.warmup_steps
    lengths = ("training.steps", "lr_scheduler.warmup_steps")
    if (start, length) == (-1, -1):
        return
    if section.decay_ratio != 1:
        yield SettingError(
            ("lr_scheduler.decay_start", "lr_scheduler.decay_steps", "lr_scheduler.decay_ratio"),
            f"decay_ratio ({section.decay_ratio:g}) cannot be combined with decay_start or "
            "decay_steps; remove decay_ratio, or the others",
        )
    if start != -1 and not warmup <= start < steps:
        yield SettingError(
            (*lengths, "lr_scheduler.decay_start"),
            f"decay_start ({start}) must be at least lr_scheduler.warmup_steps ({warmup}) and "
            f"below training.steps ({steps})",
        )
    if start == -1 and length > steps - warmup:
        yield SettingError(
            (*lengths, "lr_scheduler.decay_steps"),
            f"decay_steps ({length}) must be at most training.steps ({steps}) - "
            f"lr_scheduler.warmup_steps ({warmup})",
        )
    if start != -1 and length != -1 and section.decay_type == "inverse_sqrt":
        yield SettingError(
            ("lr_scheduler.decay_type", "lr_scheduler.decay_start", "lr_scheduler.decay_steps"),
            f'decay_steps ({length}) does not apply to decay_type = "inverse_sqrt" with '
            "decay_start: remove decay_steps",
        )


def _groups(section: Optimizer) -> Iterator[SettingError]:
    """Checks that the optimizer has the algorithms in optimizer.groups."""
    for number, group in enumerate(section.groups, start=1):
        if group.algorithm and group.algorithm not in section.ALGORITHMS:
            hint = "remove the key algorithm"
            if section.ALGORITHMS:
                hint = f"use {one_of([quote(name) for name in section.ALGORITHMS])}"
            yield SettingError(
                ("optimizer.name", "optimizer.groups"),
                f"table {number}: optimizer.name = {quote(section.name)} has no algorithm "
                f"{quote(group.algorithm)}; {hint}",
            )


def _wandb_problem() -> str:
    """The reason why Weights & Biases cannot be used here, or ""."""
    spec = importlib.util.find_spec("wandb")
    # A folder named wandb, such as wandb itself creates, looks like a package without a file.
    if spec is None or spec.origin is None:
        return "true requires the package wandb, which is not installed: pip install wandb"
    offline = os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun")
    if not (offline or os.environ.get("WANDB_API_KEY")):
        return "true requires the variable WANDB_API_KEY, or WANDB_MODE=offline"
    return ""


def _checkpoint(config: Config) -> Iterator[SettingError]:
    """Rules of [checkpoint]."""
    section = config.checkpoint
    load_step = section.load_step
    for key in ("load_step", "initial_load_path", "last_save_hf"):
        value = getattr(section, key)
        if value not in ("latest", "", 0, False) and not section.enable:
            yield SettingError(
                ("checkpoint.enable", f"checkpoint.{key}"),
                f"{key} = {literal(value)} requires checkpoint.enable = true: without it the run "
                "neither reads nor saves checkpoints",
            )
    if isinstance(load_step, int) and load_step >= config.training.steps:
        yield SettingError(
            ("training.steps", "checkpoint.load_step"),
            f"load_step ({load_step}) must be below training.steps ({config.training.steps}): no "
            "step would be trained",
        )
    if section.initial_load_hf and section.initial_load_path:
        yield SettingError(
            ("checkpoint.initial_load_path", "checkpoint.initial_load_hf"),
            "initial_load_hf cannot be combined with checkpoint.initial_load_path = "
            f"{quote(section.initial_load_path)}; set one of the two",
        )
    if section.initial_load_hf and section.exclude_from_loading:
        yield SettingError(
            ("checkpoint.initial_load_hf", "checkpoint.exclude_from_loading"),
            "exclude_from_loading cannot be combined with checkpoint.initial_load_hf, which loads "
            "all parameters; convert the model with titan-lite convert hf-to-dcp and set "
            "checkpoint.initial_load_path instead",
        )
    is_async = section.enable and section.async_mode != "disabled"
    optimizer = config.optimizer
    if is_async and isinstance(optimizer, AdamOptimizer) and optimizer.state_dtype in EIGHT_BITS:
        yield SettingError(
            ("checkpoint.enable", "optimizer.state_dtype", "checkpoint.async_mode"),
            f"async_mode = {quote(section.async_mode)} copies tensors, which torchao "
            f"does not support for optimizer.state_dtype = {quote(optimizer.state_dtype)}; set "
            'checkpoint.async_mode = "disabled"',
        )
    if section.keep_every % section.interval:
        yield SettingError(
            ("checkpoint.interval", "checkpoint.keep_every"),
            f"keep_every ({section.keep_every}) must be a multiple of checkpoint.interval "
            f"({section.interval}), because only those steps are saved",
        )
    if Path(os.path.normpath(section.folder)).parts[:1] == ("..",):
        yield SettingError(
            "checkpoint.folder",
            f"{quote(section.folder)} is outside of job.dump_folder; use an absolute path to "
            "allow this",
        )


def _documents(config: Config) -> Iterator[SettingError]:
    """Rules of the documents for training and validation."""
    data, validation = config.data, config.validation
    mixed_or_files = "data.dataset_path" if data.dataset_path else "data.sources"
    if (
        validation.enable
        and (data.dataset_path or data.sources)
        and not (validation.dataset or validation.dataset_path)
    ):
        yield SettingError(
            (mixed_or_files, "validation.enable"),
            f"with {mixed_or_files} set, validation needs its own documents: set "
            "validation.dataset_path or validation.dataset",
        )
    names = [source.name for source in data.sources]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield SettingError(
            "data.sources",
            f"names must be unique: {names.count(name)} sources have the name {quote(name)}",
        )
    for key, field in Documents.model_fields.items():
        value = getattr(data, key)
        if data.sources and value != field.default:
            yield SettingError(
                ("data.sources", f"data.{key}"),
                f"data.{key} = {quote(value)} cannot be combined with data.sources; set it "
                "in a table of data.sources",
            )


def file_rules(config: Config) -> Iterator[SettingError]:
    """Yields broken rules about paths that must, or must not, exist on this machine."""
    paths = [(f"{name}.dataset_path", getattr(config, name)) for name in ("data", "validation")]
    paths += [
        (f"data.sources.{source.name}.dataset_path", source) for source in config.data.sources
    ]
    for key, documents in paths:
        path = documents.dataset_path
        # os.path.exists: unlike Path's, it returns False for a name that is too long for a file.
        dataset = os.path.expanduser(path)  # noqa: PTH111
        exists = os.path.exists(dataset)  # noqa: PTH110
        # The search for files checks patterns with **. Path.glob rejects absolute patterns.
        exists = exists or "**" in Path(dataset).parts or bool(glob.glob(dataset))  # noqa: PTH207
        # The path of a pair of Megatron files is their common name, without suffix.
        if dataset and not (exists or os.path.exists(f"{dataset}.idx")):  # noqa: PTH110
            yield SettingError(key, _missing("file", path, key))
    checkpoint = config.checkpoint
    tokenizer = config.data.tokenizer_path
    if tokenizer and not os.path.exists(os.path.expanduser(tokenizer)):  # noqa: PTH110, PTH111
        yield SettingError(
            "data.tokenizer_path", _missing("file", tokenizer, "data.tokenizer_path")
        )
    for key in ("initial_load_path", "initial_load_hf"):
        folder = getattr(checkpoint, key)
        if folder and not os.path.isdir(os.path.expanduser(folder)):  # noqa: PTH111, PTH112
            key = f"checkpoint.{key}"
            yield SettingError(key, _missing("folder", folder, key))
    if not config.job.dump_folder:
        yield SettingError("job.dump_folder", 'the path is empty; set "." for the current folder')
    if not checkpoint.folder:
        yield SettingError(
            "checkpoint.folder", 'the path is empty; set "." for job.dump_folder itself'
        )
    dump_folder = Path(os.path.expanduser(config.job.dump_folder))  # noqa: PTH111
    wrong = _unwritable(dump_folder)
    if wrong:
        yield SettingError("job.dump_folder", wrong)
    if checkpoint.enable:
        also_wrong = _unwritable(dump_folder / os.path.expanduser(checkpoint.folder))  # noqa: PTH111
        # A folder below the run's folder is wrong for the same reason.
        if also_wrong not in ("", wrong):
            yield SettingError("checkpoint.folder", also_wrong)


def _missing(what: str, given: str, key: str) -> str:
    if os.path.exists(os.path.expanduser(given)):  # noqa: PTH110, PTH111
        return f"must be a {what}, got the file {quote(given)}"
    fetch = how_to_fetch(given, key)
    near = "" if "://" in given else near_file(Path(os.path.expanduser(given)))  # noqa: PTH111
    near = brace_hint(given) or near
    return f"no such {what}: {quote(given)}{near}{fetch}"


def _unwritable(folder: Path) -> str:
    """The reason why a folder cannot be created or written to; "" if it can."""
    for path in map(str, (folder, *folder.parents)):
        if not os.path.exists(path):  # noqa: PTH110
            continue
        if not os.path.isdir(path):  # noqa: PTH112
            return f"cannot be created: {quote(path)} is a file"
        if os.access(path, os.W_OK | os.X_OK):
            return ""
        if os.statvfs(path).f_flag & os.ST_RDONLY:
            return f"cannot be written: {quote(path)} is on a file system that is read-only"
        return f"cannot be written: no permission to write in {quote(path)}"
    return ""
