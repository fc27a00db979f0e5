"""Checks the files that a run reads. Does not import torch.

`titan-lite config --preflight`, which run_train.sh calls, runs these checks before any process
starts. Each process then repeats `preflight`, but not `check_contents`.
"""

import contextlib
import logging
from dataclasses import dataclass
from pathlib import Path

from titan_lite.checkpoint.same_model import IMPLIED_BY_WEIGHTS, model_differences
from titan_lite.checkpoint.state import Start, find_start
from titan_lite.config.load import DEFAULT
from titan_lite.config.problems import FIELDS, SettingError, collecting, errors_for, literal
from titan_lite.config.stored import words
from titan_lite.data.export_check import export_report
from titan_lite.data.files import num_bytes
from titan_lite.data.first_documents import check_documents
from titan_lite.data.held_out import held_out_rows, resolve_held_out
from titan_lite.data.hf_documents import hf_documents
from titan_lite.data.masked_lm import MaskedPairs
from titan_lite.data.packing import Packing, RowMaker
from titan_lite.data.settings import check_data_settings, data_settings
from titan_lite.data.sources import Source, check_tokens, resolve_sources
from titan_lite.data.tokenizer import Tokenizer
from titan_lite.models.hf_config import TRAINING_ONLY_FIELDS, TUNABLE
from titan_lite.models.plan import Plan
from titan_lite.planner.cluster import Cluster, find_cluster
from titan_lite.runtime.folder_lock import FolderLock
from titan_lite.training.tokenizer_checks import check_tokenizer_of_weights, fitting_tokenizer

logger = logging.getLogger(__name__)

# Held-out samples are checked only if they have at most about this many tokens; reading more would
# take too long.
MAX_HELD_OUT_TOKENS = 2**22


@dataclass(frozen=True)
class Preflight:
    """Results of the preflight. cluster: of job.cluster, None if that is not set."""

    tokenizer: Tokenizer
    sources: list[Source]
    held_out: Source | None
    start: Start
    cluster: Cluster | None


def preflight(plan: Plan) -> Preflight:
    """Loads the tokenizer, finds the data and reads the checkpoint's state.

    Raises SettingErrors.
    """
    config = plan.config
    tokenizer = start = held_out = cluster = None
    sources: list[Source] = []
    with collecting() as problems:
        with problems.checking("job.cluster"):
            if config.job.cluster:
                cluster = find_cluster(config.job.cluster)
        with problems.checking("data.tokenizer_path"):
            tokenizer = fitting_tokenizer(config.data, plan)
        with problems.checking("data.dataset"):
            sources = resolve_sources(config.data)
            if tokenizer is not None:
                check_tokens(sources, tokenizer)
            if all(source.tokens_field for source in sources):
                _warn_of_unused_keys(plan, are_checked=all(source.manifest for source in sources))
        with problems.checking("validation.dataset"):
            if config.validation.enable:
                held_out = resolve_held_out(config.validation, config.data)
                if tokenizer is not None:
                    check_tokens([held_out], tokenizer)
        with problems.checking("checkpoint.load_step"):
            start = find_start(
                config.checkpoint, plan.checkpoint_folder, last_step=config.training.steps
            )
            check_same_model(start, plan)
        with problems.checking("data.tokenizer_path"):
            if tokenizer is not None and start is not None:
                check_tokenizer_of_weights(config.data, config.checkpoint, tokenizer, start)
    assert tokenizer is not None
    assert start is not None
    return Preflight(tokenizer, sources, held_out, start, cluster)


def check_contents(plan: Plan, checked: Preflight) -> None:
    """Checks the first documents, the held-out documents and the export.

    Also checks that the data settings are those of the checkpoint that the run resumes from.
    Raises SettingErrors for problems that would end the run in its first step or at the export.
    """
    config, training = plan.config, plan.config.training
    rows: RowMaker = Packing(config.data, training.seq_len)
    if plan.family.objective == "masked_lm":
        rows = MaskedPairs(config.masked_lm, training.seq_len, checked.tokenizer)
    with collecting() as problems:
        with problems.checking("data.dataset"):
            check_documents(
                config.data,
                checked.sources,
                checked.tokenizer,
                num_samples=(training.steps - checked.start.state.step) * plan.global_batch_size,
            )
        with problems.checking("validation.dataset"):
            needed = config.validation.steps * plan.global_batch_size * training.seq_len
            most = _most_tokens(checked.held_out) if checked.held_out else None
            if most is not None and min(needed, most) <= MAX_HELD_OUT_TOKENS:
                for _ in held_out_rows(
                    config.validation,
                    config.data,
                    seq_len=training.seq_len,
                    global_batch_size=plan.global_batch_size,
                    tokenizer=checked.tokenizer,
                    rows=rows,
                ):
                    pass
        with problems.checking():
            _check_export(plan, checked.tokenizer)
        with problems.checking(checked.start.key):
            if saved := checked.start.state.parts.get("data", {}).get("settings"):
                settings = data_settings(
                    config.data,
                    checked.sources,
                    rows,
                    seq_len=training.seq_len,
                    seed=training.seed,
                )
                check_data_settings(settings, saved)


def _check_export(plan: Plan, tokenizer: Tokenizer) -> None:
    """Raises SettingError if the tokenizer exported by last_save_hf would give different ids."""
    section, hf = plan.config.checkpoint, plan.family.hf_config
    if not (section.enable and section.last_save_hf and hf) or section.allow_export_mismatch:
        return
    hf_files = hf_documents(plan.args, hf, tokenizer, dtype="float32")
    data, of_pairs = plan.config.data, not plan.args.causal
    report = export_report(hf_files, tokenizer, data, of_pairs=of_pairs)
    if not report.is_same:
        remedy = (
            "To export it with a README.md that describes the difference, set "
            "checkpoint.allow_export_mismatch = true"
        )
        raise SettingError("checkpoint.last_save_hf", f"{report.sentence}. {remedy}")


def _most_tokens(source: Source) -> int | None:
    """Estimates the largest number of tokens that a source can have; None for Hub datasets.

    One token per byte is assumed, which is too low for compressed files.
    """
    if source.manifest:
        return source.manifest.tokens
    return sum(map(num_bytes, source.files)) if source.files else None


def check_same_model(start: Start, plan: Plan) -> None:
    """Raises a SettingError for each model setting that differs from the checkpoint's.

    If another run's weights are loaded, differences in settings that are often changed on purpose
    are logged instead.
    """
    section = plan.config.checkpoint
    if start.manifest is None:
        return
    different = model_differences(start.manifest, plan.config.model, plan.args)
    for name in TRAINING_ONLY_FIELDS:
        if name != "max_seq_len" or plan.args.positions == "rotary":
            different.pop(name, None)
    if not start.resumes:
        for name in section.allow_model_changes:
            different.pop(name, None)
        for name in IMPLIED_BY_WEIGHTS if section.exclude_from_loading else ():
            # These may differ if parameters are excluded. Loading checks the names and shapes of
            # all others.
            different.pop(name, None)
        for name in TUNABLE:
            if pair := different.pop(name, None):
                logger.warning(
                    "model.%s is %s; the weights of %s were trained with %s",
                    name,
                    words(pair[1]),
                    start.source,
                    words(pair[0]),
                )
    # Weights of other shapes cannot be loaded with any setting.
    can_load = not different.keys() & IMPLIED_BY_WEIGHTS
    if start.resumes:
        weights = " and set checkpoint.initial_load_path to this checkpoint" if can_load else ""
        new_run = f"to start a new run, choose another job.dump_folder{weights}"
        remedy = f"; a resumed run must keep its model; {new_run}"
    else:
        allowed = f"checkpoint.allow_model_changes = {literal(sorted(different))}"
        remedy = f"; to load the weights nevertheless, set {allowed}" if can_load else ""
    by_key: dict[str, list[str]] = {}
    for name, (saved, own) in different.items():
        # head_dim, if not set, is dim / num_heads.
        sizes = ("model.num_heads", "model.dim") if name == "head_dim" else ()
        keys = (f"model.{name}", *sizes, "model.flavor", "model.name")
        key = next((key for key in keys if plan.origins.get(key, DEFAULT) != DEFAULT), start.key)
        by_key.setdefault(key, []).append(f"{name} is {words(own)}, not {words(saved)}")
    with collecting() as problems:
        for key, listed in by_key.items():
            message = f"differs from the checkpoint {start.source}: {'; '.join(listed)}{remedy}"
            problems.errors.append(SettingError(key, message))


def lock_folders(plan: Plan) -> contextlib.ExitStack:
    """Locks the run folder and, if it is elsewhere, the checkpoint folder.

    Closing the returned stack unlocks them. SettingError if another run uses one.
    """
    with contextlib.ExitStack() as locks:
        for key, folder in _locked_folders(plan).items():
            with errors_for(key):
                locks.callback(FolderLock(folder, key).release)
        return locks.pop_all()


def check_locks(plan: Plan) -> None:
    """Raises SettingError for a folder that another run writes to; creates no folder."""
    for key, folder in _locked_folders(plan).items():
        if folder.is_dir():
            with errors_for(key):
                FolderLock(folder, key).release()


def _locked_folders(plan: Plan) -> dict[str, Path]:
    folders = {"job.dump_folder": plan.run_folder}
    checkpoints = plan.checkpoint_folder
    # Two runs can be given the same checkpoint folder outside their own, so it has its own lock.
    is_elsewhere = not checkpoints.resolve().is_relative_to(plan.run_folder.resolve())
    if plan.config.checkpoint.enable and is_elsewhere:
        folders["checkpoint.folder"] = checkpoints
    return folders


def _warn_of_unused_keys(plan: Plan, *, are_checked: bool) -> None:
    """Warns about set keys that have no effect on tokenized data.

    are_checked: all documents were checked when they were tokenized.
    """
    for name in ("tokenizer_threads", *(["on_bad_document"] if are_checked else [])):
        key = f"data.{name}"
        if getattr(plan.config.data, name) != FIELDS["data"][name].default:
            logger.warning(
                "%s (%s) has no effect because the data is tokenized already",
                key,
                plan.origins[key],
            )
