"""Saving and resuming: a checkpoint is complete or it does not exist."""

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from titan_lite.checkpoint.manifest import (
    CheckpointManifest,
    Degrees,
    write_manifest,
    write_text,
)
from titan_lite.checkpoint.saving import Save, SaveError, Saver, local_bytes
from titan_lite.checkpoint.state import (
    RUN_STATE_FILE,
    RunState,
    Start,
    delete_old,
    excludes,
    retire_later_steps,
    saved_steps,
)
from titan_lite.checkpoint.storage import (
    CheckpointReader,
    CheckpointWriter,
    Files,
    LoadPlanner,
    first_failure,
    in_float32,
    versions,
)
from titan_lite.config.optimizers import EIGHT_BITS
from titan_lite.config.problems import SettingError
from titan_lite.config.schema import Checkpoint
from titan_lite.config.units import format_number, format_scaled
from titan_lite.nn.init import CHECKPOINT_PREFIX
from titan_lite.nn.transformer import Transformer
from titan_lite.runtime.stored_files import sync_folder

logger = logging.getLogger(__name__)

# Optimizer state by parameter name, because pipeline stages have different parameters.
BY_NAME = StateDictOptions(flatten_optimizer_state_dict=True)
# Prefix of the names that a checkpoint has; groups and their settings are in the configuration.
STATE = "state."


class Stateful(Protocol):
    """A part of a run with state in each checkpoint: JSON-serializable, the same on all ranks."""

    def state_dict(self) -> Any:
        """Returns the state; collective."""

    def load_state_dict(self, state: Any) -> None:
        """Restores the result of `state_dict`, which may be of another layout."""


@dataclass(kw_only=True, eq=False)
class CheckpointManager:
    """Checkpoints of one run, each a folder `step-N` below `folder`.

    A folder has the files of torch.distributed.checkpoint (model, optimizer, generators of each
    rank), run_state.json and manifest.json. It is written as `step-N.incomplete`, and renamed when
    every rank has finished. `save`, `wait`, `metrics` and `load` are collective.

    average: averages of the weights, by name. exports_average: save these as the weights if only
    weights are saved. layout, config, tokenizer, model_facts: values of the manifest.
    timeout_seconds: limit for a save.
    """

    section: Checkpoint
    folder: Path
    model: Transformer
    optimizer: torch.optim.Optimizer
    average: Mapping[str, torch.Tensor] | None
    exports_average: bool
    stateful: Mapping[str, Stateful]
    device: torch.device
    layout: Degrees
    config: dict[str, Any]
    tokenizer: str
    model_facts: dict[str, Any]
    timeout_seconds: int
    saving: Save | None = field(default=None, init=False)
    latest_step: int = field(default=0, init=False)
    costs: dict[str, float] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.rank = dist.get_rank()
        mode = self.section.async_mode if self.section.enable else "disabled"
        self.saver = Saver(mode, self.device, self.timeout_seconds)
        if mode == "async_pinned":
            self.optimizer.register_step_pre_hook(self._wait_for_staging)

    def should_save(self, step: int, last_step: int) -> bool:
        return self.section.enable and (step % self.section.interval == 0 or step == last_step)

    def save(self, state: RunState, *, is_last: bool = False) -> None:
        """Saves the run at `state`, or starts an async save; does nothing for a saved step.

        is_last: no step follows, so saving only weights is allowed. Raises SaveError if this save
        or the previous one fails.
        """
        if state.step == self.latest_step:
            return
        self.wait()
        state.parts = {name: part.state_dict() for name, part in self.stateful.items()}
        content = "model" if is_last and self.section.last_save_model_only else "run"
        save = Save(state.step, content, self.folder / f"step-{state.step}")
        with save.blocking():
            tensors = self._tensors(content)
            if content == "model":
                if self.average is not None and self.exports_average:
                    tensors["model"] |= self.average
                dtype = getattr(torch, self.section.export_dtype)
                tensors["model"] = {key: value.to(dtype) for key, value in tensors["model"].items()}
            self._make_folder(save, state)
            save.size = self._check_shared(save.aside, local_bytes(tensors))
            writer = CheckpointWriter(save.aside, lambda files: self._commit(save, files))
            self.saving, self.latest_step = save, state.step
            self.saver.start(save, tensors, writer)
        if self.saver.mode == "disabled":
            self._end()

    def wait(self) -> None:
        """Waits for an async save, if there is one. Raises SaveError if it failed."""
        if self.saving is not None:
            with self.saving.blocking():
                self.saving.written.exception()
            self._end()

    def metrics(self) -> dict[str, float]:
        """Returns the costs of the saves that ended since the last call, for a log record.

        Raises SaveError if an async save failed.
        """
        if self.saving is not None:
            done = torch.tensor(self.saving.written.done())
            dist.all_reduce(done, op=dist.ReduceOp.MIN)
            if done:
                self._end()
        costs, self.costs = self.costs, {}
        if costs:
            costs["checkpoint_gb_per_second"] = (
                costs["checkpoint_bytes"] / costs["checkpoint_seconds"] / 1e9
            )
        return costs

    def load(self, start: Start) -> None:
        """Loads the checkpoint of `start` in place: the whole run, or only the weights."""
        assert start.source is not None
        excluded = [] if start.resumes else self.section.exclude_from_loading
        reader = CheckpointReader(start.source)
        saved = reader.read_metadata().state_dict_metadata
        if start.content == "run" and any(key.startswith(f"optimizer.{STATE}") for key in saved):
            self._create_state(excluded)
        whole = self._tensors(start.content)
        rng_key = f"rng.rank{self.rank}"
        rng = whole.pop(rng_key, {})
        tensors = {part: _without(values, excluded) for part, values in whole.items()}
        if start.content == "run" and not self._has_blocks_of(start):
            tensors["optimizer"] = in_float32(tensors["optimizer"])
        # With more ranks than the saving run, the additional ones keep their own generators.
        averages = tensors.pop("ema", {})
        if averages := {k: v for k, v in averages.items() if f"ema.{k}" in saved}:
            tensors["ema"] = averages
        has_rng = bool(rng) and all(f"{rng_key}.{kind}" in saved for kind in rng)
        if has_rng:
            tensors[rng_key] = rng
        planner = LoadPlanner(self.model.vocab_size, start.source, excluded)
        try:
            dcp.load(tensors, storage_reader=reader, planner=planner)
        except CheckpointException as error:
            failure = first_failure(error)[1]
            if isinstance(failure, SettingError):
                raise failure from error
            raise ValueError(str(failure)) from error
        self.latest_step = start.own_step
        weights = whole["model"] | tensors["model"]
        for name, average in (self.average or {}).items():
            if name not in averages:
                average.copy_(weights[name])
        set_model_state_dict(self.model, weights)
        if start.content == "model":
            return
        if self.optimizer.state:
            set_optimizer_state_dict(
                self.model,
                self.optimizer,
                # The groups stay those of this run: their settings come from the configuration.
                optim_state_dict=self._optimizer() | tensors["optimizer"],
                options=BY_NAME,
            )
        for name in self.stateful.keys() & start.state.parts.keys():
            self.stateful[name].load_state_dict(start.state.parts[name])
        if has_rng:
            torch.set_rng_state(rng["cpu"])
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(rng["cuda"], self.device)

    def _has_blocks_of(self, start: Start) -> bool:
        """Returns True if quantized moments have the same blocks in the checkpoint as in this run.

        Also True if there are none.
        """
        assert start.manifest is not None
        runs = ((start.manifest.config, start.manifest.layout), (self.config, self.layout))
        saved, own = ((config["optimizer"].get("state_dtype"), at) for config, at in runs)
        return saved == own or not {saved[0], own[0]} & {*EIGHT_BITS}

    def retire_newer_checkpoints(self, step: int) -> None:
        """Retires the checkpoints later than `step`, at which the run starts; on one rank."""
        if self.section.enable:
            if retired := retire_later_steps(self.folder, step):
                logger.warning("Checkpoints later than step %d were moved to %s", step, retired)
        elif saved_steps(self.folder):
            logger.warning(
                "%s contains checkpoints; they are ignored because checkpoint.enable = false",
                self.folder,
            )

    def close(self) -> None:
        """Waits for an async save, and releases its resources."""
        if self.saving is not None and (error := self.saving.error()):
            logger.error("%s", error)
        self.saver.close()

    def _tensors(self, content: str) -> dict[str, Any]:
        if content == "model":
            return {"model": get_model_state_dict(self.model)}
        optimizer = {}
        if self.optimizer.state:
            optimizer = {k: v for k, v in self._optimizer().items() if k.startswith(STATE)}
        generators = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            generators["cuda"] = torch.cuda.get_rng_state(self.device)
        tensors: dict[str, Any] = {
            "model": get_model_state_dict(self.model),
            "optimizer": optimizer,
            f"rng.rank{self.rank}": generators,
        }
        if self.average is not None:
            tensors["ema"] = self.average
        return tensors

    def _create_state(self, excluded: Sequence[str]) -> None:
        """Creates the state that is loaded, for optimizers that create it in their first step."""
        if not self.optimizer.state:
            self._optimizer()
            for name, parameter in self.model.named_parameters():
                if excludes(excluded, name.replace(CHECKPOINT_PREFIX, "")):
                    self.optimizer.state.pop(parameter, None)

    def _optimizer(self) -> dict[str, Any]:
        """Returns the optimizer's state and groups by parameter name.

        torch creates the state of an optimizer without any, by a step with a rate of zero.
        """
        flat: dict[str, Any] = get_optimizer_state_dict(self.model, self.optimizer, options=BY_NAME)
        return flat

    def _make_folder(self, save: Save, state: RunState) -> None:
        failure: list[str | None] = [None]
        if self.rank == 0:
            try:
                shutil.rmtree(save.aside, ignore_errors=True)
                save.aside.mkdir(parents=True)
                save.files[RUN_STATE_FILE] = write_text(
                    save.aside / RUN_STATE_FILE, state.to_json()
                )
            except OSError as error:
                failure = [str(error)]
        dist.broadcast_object_list(failure, src=0)
        if failure[0] is not None:
            raise SaveError(f"step {save.step} was not saved to {self.folder}: {failure[0]}")

    def _check_shared(self, aside: Path, size: int) -> int:
        """Returns the sum of all ranks' sizes; ValueError unless all ranks see rank 0's folder."""
        by_rank: list[tuple[bool, int]] = [(False, 0)] * dist.get_world_size()
        dist.all_gather_object(by_rank, ((aside / RUN_STATE_FILE).exists(), size))
        if blind := [rank for rank, (seen, _) in enumerate(by_rank) if not seen]:
            raise ValueError(
                f"ranks {blind} cannot see {aside}, which rank 0 created: the folder must be on a "
                "file system that all nodes share"
            )
        return sum(size for _, size in by_rank)

    def _commit(self, save: Save, files: Files) -> None:
        """Completes the checkpoint by a rename; on rank 0, when all ranks have finished."""
        save.files.update(files)
        manifest = CheckpointManifest(
            step=save.step,
            content=save.content,
            world_size=dist.get_world_size(),
            layout=self.layout,
            versions=versions(),
            config=self.config,
            files=save.files,
            tokenizer=self.tokenizer,
            model=self.model_facts,
        )
        write_manifest(save.aside, manifest)
        sync_folder(save.aside)
        save.aside.rename(save.folder)
        sync_folder(self.folder)
        try:
            delete_old(self.section, self.folder)
        except OSError as error:
            logger.warning("Old checkpoints could not be deleted: %s", error)

    def _wait_for_staging(self, *_: Any) -> None:
        if self.saving is not None and not self.saving.staged.done():
            with self.saving.blocking():
                self.saving.staged.result()

    def _end(self) -> None:
        """Returns the error or the costs of a save that has ended on all ranks."""
        save, self.saving = self.saving, None
        assert save is not None
        if error := save.error():
            if self.rank == 0:
                shutil.rmtree(save.aside, ignore_errors=True)
            raise error
        written = sum(file.bytes for file in save.files.values())
        worst = torch.tensor([save.blocked, save.seconds, written], dtype=torch.float64)
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        blocked, seconds, size = worst.tolist()
        costs = {
            "checkpoint_blocked_seconds": blocked,
            "checkpoint_seconds": seconds,
            "checkpoint_bytes": size,
        }
        self.costs = {key: value + self.costs.get(key, 0.0) for key, value in costs.items()}
        logger.info(
            "Checkpoint of step %d: %s in %s s (%s), training was blocked for %s s: %s",
            save.step,
            format_scaled(size, "B"),
            format_number(seconds, ".2f"),
            format_scaled(size / seconds, "B/s"),
            format_number(blocked, ".2f"),
            save.folder,
        )


def _without(tensors: dict[str, Any], patterns: Sequence[str]) -> dict[str, Any]:
    """Returns a part of a state dict without excluded parameters."""
    return {key: value for key, value in tensors.items() if not excludes(patterns, _parameter(key))}


def _parameter(key: str) -> str:
    """Returns the parameter of "state.layers.0.wq.weight.exp_avg", or the model's own name."""
    return key.removeprefix(STATE).rpartition(".")[0] if key.startswith(STATE) else key
