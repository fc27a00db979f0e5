"""Reports the settings that a resumed run has changed since its checkpoint.

Does not import torch.
"""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

from titan_lite.checkpoint.manifest import CheckpointManifest
from titan_lite.checkpoint.same_model import model_differences
from titan_lite.config.problems import keys
from titan_lite.config.schema import LRScheduler
from titan_lite.config.stored import global_batch_size, setting, words
from titan_lite.models.plan import Plan
from titan_lite.optim.schedule import LRSchedule, jump

logger = logging.getLogger(__name__)

# Sections and keys that change neither training nor validation results.
NO_EFFECT_ON_RESULTS = ("job.", "checkpoint.", "metrics.", "profiling.", "comm.")
NO_EFFECT_KEYS = ("data.prefetch", "data.tokenizer_threads", "training.gc_freq")
# Prefixes of keys that set the learning rate.
SCHEDULE = ("training.steps", "optimizer.lr", "lr_scheduler.")


def log_changes(manifest: CheckpointManifest, plan: Plan, versions: Mapping[str, str]) -> None:
    """Logs the settings that differ from the checkpoint's, and a jump of the learning rate."""
    changes = changed_settings(manifest, plan, versions)
    if changes:
        width = max(map(len, changes))
        lines = (f"  {key:<{width}}  {words(a)} -> {words(b)}" for key, (a, b) in changes.items())
        logger.info("Changed since the checkpoint was saved:\n%s", "\n".join(lines))
    before, after = (_schedule(c) for c in (manifest.config, plan.config.model_dump()))
    if (rates := jump(before, after, manifest.step)) is not None:
        because = ", ".join(
            f"{key} {words(a)} -> {words(b)}"
            for key, (a, b) in changes.items()
            if key.startswith(SCHEDULE)
        )
        logger.warning(
            "The learning rate jumps from %.6g in step %d to %.6g in step %d: %s",
            rates[0],
            manifest.step,
            rates[1],
            manifest.step + 1,
            because,
        )


def changed_settings(
    manifest: CheckpointManifest, plan: Plan, versions: Mapping[str, str]
) -> dict[str, tuple[Any, Any]]:
    """Returns (checkpoint's value, run's value) of each key that differs and changes results."""
    before = _settings(manifest.config, manifest.layout)
    after = _settings(plan.config.model_dump(), dataclasses.asdict(plan.dims))
    # Older checkpoints have fewer mesh axes.
    pairs = {key: (before[key], after[key]) for key in after if key in before}
    for name, pair in model_differences(manifest, plan.config.model, plan.args).items():
        pairs[f"model.{name}"] = pair
    for name in ("titan_lite", "torch"):
        pairs[name] = manifest.versions.get(name), versions[name]
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _settings(config: Mapping[str, Any], layout: Mapping[str, int]) -> dict[str, Any]:
    """Returns, by key, the settings that affect results, with resolved degrees and batch."""
    # Other keys of [model] are compared as resolved, by model_differences.
    settings = {
        key: setting(config, key)
        for key in keys()
        if key not in NO_EFFECT_KEYS
        and (key == "model.flavor" or not key.startswith((*NO_EFFECT_ON_RESULTS, "model.")))
    }
    settings |= {f"parallel.{axis}": size for axis, size in layout.items()}
    return settings | {"training.global_batch_size": global_batch_size(config, layout)}


def _schedule(config: Mapping[str, Any]) -> LRSchedule:
    section = {name: setting(config, f"lr_scheduler.{name}") for name in LRScheduler.model_fields}
    # Not validated: values of an older version may be invalid today.
    return LRSchedule(
        setting(config, "optimizer.lr"),
        LRScheduler.model_construct(**section),
        setting(config, "training.steps"),
    )
