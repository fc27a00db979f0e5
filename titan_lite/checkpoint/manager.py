"""Saving and resuming: a checkpoint is complete or it does not exist."""

import json
import logging
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)

from titan_lite.checkpoint.state import RUN_STATE_FILE, RunState, retire_later_steps, saved_steps
from titan_lite.config.schema import Checkpoint

logger = logging.getLogger(__name__)

# Optimizer state under the parameter's name alone: ranks of other pipeline stages have others.
BY_NAME = StateDictOptions(flatten_optimizer_state_dict=True)


class CheckpointManager:
    """Checkpoints of one run, each a folder `step-N` below `folder`.

    A folder holds the files of torch.distributed.checkpoint (model, optimizer, generators of each
    rank) and run_state.json; written as `step-N.incomplete`, renamed once every rank has finished.
    """

    def __init__(
        self,
        section: Checkpoint,
        folder: Path,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
    ) -> None:
        self.section = section
        self.folder = folder
        self.model = model
        self.optimizer = optimizer
        self.device = device
        self.rank = dist.get_rank()

    def should_save(self, step: int, last_step: int) -> bool:
        return self.section.enable and (step % self.section.interval == 0 or step == last_step)

    def save(self, state: RunState) -> Path:
        """Saves `state` and what it belongs to; collective. Returns the new folder."""
        target = self.folder / f"step-{state.step}"
        aside = target.with_name(target.name + ".incomplete")
        if self.rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            (aside / RUN_STATE_FILE).write_text(json.dumps(asdict(state), indent=1))
        dist.barrier()
        everywhere: list[bool] = [False] * dist.get_world_size()
        dist.all_gather_object(everywhere, (aside / RUN_STATE_FILE).exists())
        if not all(everywhere):
            blind = [rank for rank, seen in enumerate(everywhere) if not seen]
            raise ValueError(
                f"ranks {blind} do not see {aside}, which rank 0 made: job.dump_folder must be "
                "on a file system that all nodes share"
            )
        # Returns on each rank once the coordinator has written the metadata of all.
        dcp.save(self._tensors(), checkpoint_id=aside)
        if self.rank == 0:
            shutil.rmtree(target, ignore_errors=True)
            aside.rename(target)
        dist.barrier()
        if self.rank == 0:
            self._delete_old()
        return target

    def load(self, step: int) -> None:
        """Restores model, optimizer and generators of `step` in place; collective."""
        source = self.folder / f"step-{step}"
        tensors = self._tensors()
        saved = dcp.FileSystemReader(source).read_metadata().state_dict_metadata
        # A rank that the saving run did not have keeps the generators it was seeded with.
        rng_key = f"rng.rank{self.rank}"
        has_rng = all(f"{rng_key}.{kind}" in saved for kind in tensors[rng_key])
        if not has_rng:
            del tensors[rng_key]
        for name, tensor in tensors["model"].items():
            size = getattr(saved.get(f"model.{name}"), "size", tensor.shape)
            if size != tensor.shape:
                raise ValueError(
                    f"{name} is {tuple(size)} in {source} and {tuple(tensor.shape)} in this run: "
                    "model and parallel.tp, which pads the vocabulary, must be as they were"
                )
        dcp.load(tensors, checkpoint_id=source)
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=tensors["model"],
            optim_state_dict=tensors["optimizer"],
            options=BY_NAME,
        )
        if has_rng:
            torch.set_rng_state(tensors[rng_key]["cpu"])
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(tensors[rng_key]["cuda"], self.device)

    def leave_later_branch(self, step: int) -> None:
        """Retires the checkpoints later than `step`, which the run goes on from; on one rank."""
        if self.section.enable:
            if retired := retire_later_steps(self.folder, step):
                logger.warning("Checkpoints later than step %d were moved to %s", step, retired)
        elif saved_steps(self.folder):
            logger.warning(
                "%s holds checkpoints, which this run neither reads nor adds to: "
                "checkpoint.enable is false",
                self.folder,
            )

    def _tensors(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer, options=BY_NAME)
        generators = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            generators["cuda"] = torch.cuda.get_rng_state(self.device)
        return {"model": model, "optimizer": optimizer, f"rng.rank{self.rank}": generators}

    def _delete_old(self) -> None:
        for leftover in self.folder.glob("step-*.incomplete"):
            shutil.rmtree(leftover)
        keep = self.section.keep_latest_k
        if keep > 0:
            for step in saved_steps(self.folder)[:-keep]:
                shutil.rmtree(self.folder / f"step-{step}")


def agree_on_step(step: int, folder: Path) -> None:
    """ValueError on every rank unless all found the same step to resume from; collective."""
    steps: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(steps, step)
    if len(set(steps)) > 1:
        raise ValueError(
            f"ranks found different checkpoints in {folder} (by rank, 0 for none: {steps}): "
            "job.dump_folder must be on a file system that all nodes share"
        )
