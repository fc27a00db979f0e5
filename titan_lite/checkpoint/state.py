"""Finds the checkpoints of a run, chooses its start, and deletes old ones.

Does not import torch.
"""

import fnmatch
import json
import logging
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from titan_lite.checkpoint.hf_files import CONFIG_FILE
from titan_lite.checkpoint.manifest import MANIFEST_FILE, CheckpointManifest, read_manifest
from titan_lite.config.problems import SettingError, did_you_mean, errors_for, nearest, quote
from titan_lite.config.schema import Checkpoint
from titan_lite.runtime.stored_files import DamagedError, damaged_files
from titan_lite.runtime.writing import make_new_folder, writing

logger = logging.getLogger(__name__)

RUN_STATE_FILE = "run_state.json"
STEP_FOLDER = re.compile(r"step-(0|[1-9][0-9]*)")


@dataclass(kw_only=True)
class RunState:
    """Progress of a run, JSON-serializable: written by rank 0, equal on all ranks.

    step: optimizer steps done. tokens: tokens trained on by the whole job. parts: the state of each
    Stateful, by name.
    """

    step: int = 0
    tokens: int = 0
    parts: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps({"step": self.step, "tokens": self.tokens, **self.parts}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "RunState":
        parts = json.loads(text)
        return cls(step=parts.pop("step"), tokens=parts.pop("tokens"), parts=parts)


@dataclass(frozen=True, kw_only=True)
class Start:
    """The start of a run.

    source: the checkpoint to load; None for fresh weights. content: the part of it to load, "run"
    or "model". manifest: that of the checkpoint. resumes: True if it is the run's own checkpoint.
    """

    state: RunState = field(default_factory=RunState)
    source: Path | None = None
    manifest: CheckpointManifest | None = None
    content: str = "run"
    resumes: bool = False

    @property
    def own_step(self) -> int:
        """Steps done by this run itself; 0 if it starts from another run's checkpoint."""
        return self.state.step if self.resumes else 0

    @property
    def key(self) -> str:
        """The key that selects the checkpoint."""
        return "checkpoint.load_step" if self.resumes else "checkpoint.initial_load_path"


def saved_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in `folder`, ascending, including damaged ones."""
    if not folder.is_dir():
        return []
    matches = (STEP_FOLDER.fullmatch(path.name) for path in folder.iterdir())
    return sorted(int(match[1]) for match in matches if match)


def newest_below(folder: Path) -> Path | None:
    """The newest complete checkpoint below a folder of checkpoints, a run, or several runs."""
    if (folder / MANIFEST_FILE).exists():
        return None
    for depth in ("", "*/", "*/*/"):
        paths = [file.parent for file in folder.glob(f"{depth}step-*/{MANIFEST_FILE}")]
        if paths := [path for path in paths if STEP_FOLDER.fullmatch(path.name)]:
            return max(paths, key=lambda path: int(path.name.removeprefix("step-")))
    return None


def find_start(
    section: Checkpoint,
    folder: Path,
    damaged: Mapping[Path, DamagedError] | None = None,
    *,
    last_step: int | None = None,
) -> Start:
    """Returns the run's own checkpoint to resume, else the initial one, else a fresh start.

    damaged: checkpoints that are known to be damaged. last_step: the run's last step, whose
    checkpoint may have only weights, because no step is left to train. Raises ValueError if the
    configured checkpoint is missing, damaged (DamagedError) or has only weights.
    """
    if not section.enable:
        return Start()
    if section.load_step != 0:
        own = _own_checkpoint(section.load_step, folder, dict(damaged or {}))
        if own is not None:
            is_done = own[1].step == last_step
            return _start(*own, own[1].content if is_done else "run", resumes=True)
    if not section.initial_load_path:
        return Start()
    source = Path(section.initial_load_path).expanduser()
    if newest := newest_below(source):
        message = f"must name one checkpoint, for example {newest}"
        raise SettingError("checkpoint.initial_load_path", message)
    if (source / CONFIG_FILE).is_file() and not (source / MANIFEST_FILE).exists():
        message = f"{source} is a Hugging Face model: set checkpoint.initial_load_hf to it instead"
        raise SettingError("checkpoint.initial_load_path", message)
    content = "model" if section.initial_load_model_only else "run"
    with errors_for("checkpoint.initial_load_path"):
        manifest = _manifest_of(source)
    return _start(source, manifest, content, resumes=False)


def _own_checkpoint(
    step: int | str, folder: Path, damaged: dict[Path, DamagedError]
) -> tuple[Path, CheckpointManifest] | None:
    """The checkpoint of a step, or the newest complete one; None if there is none at all."""
    steps = saved_steps(folder)
    if step != "latest":
        source = folder / f"step-{step}"
        if step in steps:
            return source, _manifest_of(source)
        available = ", ".join(map(str, steps)) or "none"
        raise ValueError(f"no checkpoint of step {step} in {folder}; steps found: {available}")
    worse = []
    for number in reversed(steps):
        source = folder / f"step-{number}"
        try:
            if source in damaged:
                raise damaged[source]
            manifest = _manifest_of(source)
        except DamagedError as error:
            worse.append(str(error))
            continue
        for sentence in worse:
            logger.warning("Skipped a checkpoint: %s", sentence)
        return source, manifest
    if worse:
        raise DamagedError(
            f"no checkpoint in {folder} is complete: {'; '.join(worse)}. Set "
            "checkpoint.load_step = 0 to start from step 0"
        )
    return None


def _manifest_of(source: Path) -> CheckpointManifest:
    """Reads the manifest of a checkpoint, and checks its run_state.json, which is read first."""
    manifest = read_manifest(source)
    names = [RUN_STATE_FILE] if RUN_STATE_FILE in manifest.files else []
    for sentence in damaged_files(source, manifest.files, names):
        raise DamagedError(sentence)
    return manifest


def _start(source: Path, manifest: CheckpointManifest, content: str, *, resumes: bool) -> Start:
    if content == "model" and not resumes:
        return Start(source=source, manifest=manifest, content=content)
    if content == "run" and manifest.content != "run":
        if not resumes:
            raise SettingError(
                "checkpoint.initial_load_model_only",
                f"{source} contains only weights, so a run cannot resume from it: set "
                "checkpoint.initial_load_model_only = true to start a new run with them",
            )
        raise ValueError(
            f"{source} contains only weights (last_save_model_only) and cannot be resumed: set "
            "checkpoint.load_step to an earlier step, export it by titan-lite convert, or, for a "
            "new run, choose another job.dump_folder and set checkpoint.initial_load_path = "
            f"{quote(str(source))}"
        )
    state = RunState.from_json((source / RUN_STATE_FILE).read_text())
    return Start(state=state, source=source, manifest=manifest, content=content, resumes=resumes)


def excludes(patterns: Sequence[str], name: str) -> bool:
    """Returns True if a parameter's name matches a pattern of checkpoint.exclude_from_loading."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def check_excluded(patterns: Sequence[str], names: Sequence[str]) -> None:
    """Raises ValueError for a pattern that none of the model's parameters matches."""
    for pattern in patterns:
        if not any(excludes([pattern], name) for name in names):
            raise ValueError(
                f"{quote(pattern)} matches no parameter; the model has {names[0]} to {names[-1]}"
                f"{did_you_mean(nearest(pattern, names))}"
            )


def retire_later_steps(folder: Path, step: int) -> Path | None:
    """Moves checkpoints later than `step`, which the run does not continue, to another folder.

    Otherwise the next resume would take the newest of them. Returns the folder,
    `folder`/retired-TIME.
    """
    later = [other for other in saved_steps(folder) if other > step]
    if not later:
        return None
    retired = folder / time.strftime("retired-%Y%m%d-%H%M%S")
    with writing(retired):
        retired = make_new_folder(retired)
        for other in later:
            (folder / f"step-{other}").rename(retired / f"step-{other}")
    return retired


def delete_old(section: Checkpoint, folder: Path) -> None:
    """Deletes incomplete checkpoints, and those that are not to be kept."""
    steps = saved_steps(folder)
    if section.keep_latest_k > 0:
        for step in steps[: -section.keep_latest_k]:
            if section.keep_every == 0 or step % section.keep_every != 0:
                path = folder / f"step-{step}"
                # Renamed first: half deleted, it must count as incomplete.
                path.rename(path.with_name(path.name + ".incomplete"))
    for leftover in folder.glob("step-*.incomplete"):
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()
