"""The checked settings of a run, with the mesh, model, batch and folders that follow from them.

Not `titan-lite plan`, whose predictions are in planner/.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from titan_lite.config.dims import ParallelDims, resolve_global_batch
from titan_lite.config.load import LoadedConfig, load_config
from titan_lite.config.problems import collecting
from titan_lite.config.rules import config_rules, file_rules
from titan_lite.models.args import DecoderArgs
from titan_lite.models.model_rules import hf_rules, model_rules, objective_rules, optimizer_rules
from titan_lite.models.registry import Family, resolve
from titan_lite.models.setting_warnings import log_warnings


@dataclass(frozen=True, kw_only=True)
class Plan(LoadedConfig):
    """A valid configuration, and the values derived from it for a number of processes."""

    dims: ParallelDims
    family: Family
    args: DecoderArgs
    global_batch_size: int
    """Samples per optimizer step over all ranks."""
    micro_steps: int
    """Micro-batches of a rank in an optimizer step."""
    run_folder: Path
    """Folder that the run writes to."""
    checkpoint_folder: Path


def make_plan(
    path: str | Path | None,
    overrides: Sequence[str] = (),
    world_size: int | None = None,
    *,
    with_files: bool = True,
) -> Plan:
    """Loads a configuration and checks everything that needs no hardware.

    world_size: None: the smallest that the degrees allow. with_files: check that the files of the
    run exist. Raises ConfigError with all problems of loading, or else with all broken rules. Logs
    warnings for settings without effect.
    """
    loaded = load_config(path, overrides)
    config = loaded.config
    if world_size is None:
        world_size = ParallelDims.smallest_world(config.parallel)
    dims = None
    with loaded.reporting(), collecting() as problems:
        if with_files:
            problems.errors += file_rules(config)
        with problems.checking():
            dims = ParallelDims.resolve(config.parallel, world_size)
        problems.errors += config_rules(config, dims)
        with problems.checking():
            family, args = resolve(config.model)
            problems.errors += model_rules(config, args)
            problems.errors += objective_rules(config, family)
            problems.errors += optimizer_rules(config, family)
            problems.errors += hf_rules(config, family, args)
    assert dims is not None
    log_warnings(loaded, dims, family, args)
    training = config.training
    micro = training.local_batch_size * dims.batch
    batch = resolve_global_batch(training.global_batch_size, training.local_batch_size, dims.batch)
    # os.path leaves an unknown ~user unchanged, Path raises.
    folder = Path(os.path.expanduser(config.job.dump_folder))  # noqa: PTH111
    return Plan(
        config=config,
        origins=loaded.origins,
        layers=loaded.layers,
        dims=dims,
        family=family,
        args=args,
        global_batch_size=batch,
        micro_steps=batch // micro,
        run_folder=folder,
        checkpoint_folder=folder / os.path.expanduser(config.checkpoint.folder),  # noqa: PTH111
    )
