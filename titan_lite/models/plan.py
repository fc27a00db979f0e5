"""The checked settings of a run, with the mesh, model, batch and folders that follow from them.

Not `titan-lite plan`, whose predictions are in planner/.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
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
    """A valid configuration, and the values derived from it for a number of processes.

    `dataclasses.replace` with another configuration, or other dims, derives them from those.
    """

    dims: ParallelDims
    family: Family
    args: DecoderArgs

    @cached_property
    def global_batch_size(self) -> int:
        """Samples per optimizer step over all ranks."""
        training = self.config.training
        return resolve_global_batch(
            training.global_batch_size, training.local_batch_size, self.dims.batch
        )

    @cached_property
    def micro_steps(self) -> int:
        """Micro-batches of a rank in an optimizer step."""
        return self.global_batch_size // (self.config.training.local_batch_size * self.dims.batch)

    @property
    def attended_tokens(self) -> int:
        """Tokens that a token can attend to in FLOP counts, which ignore document lengths."""
        data = self.config.data
        return data.packing_block if data.packing == "fixed" else self.config.training.seq_len

    @property
    def head_token_fraction(self) -> float:
        """Fraction of the tokens that the output projection is computed for.

        Labels dropped at padding or document ends are not subtracted.
        """
        if self.config.training.loss_positions == "all" or self.family.objective == "causal_lm":
            return 1.0
        return self.config.masked_lm.mask_prob

    @cached_property
    def run_folder(self) -> Path:
        """Folder that the run writes to."""
        # os.path leaves an unknown ~user unchanged, Path raises.
        return Path(os.path.expanduser(self.config.job.dump_folder))  # noqa: PTH111

    @cached_property
    def checkpoint_folder(self) -> Path:
        """Folder of the checkpoints, in run_folder unless its path is absolute."""
        return self.run_folder / os.path.expanduser(self.config.checkpoint.folder)  # noqa: PTH111


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
    return Plan(
        config=config,
        origins=loaded.origins,
        layers=loaded.layers,
        dims=dims,
        family=family,
        args=args,
    )
