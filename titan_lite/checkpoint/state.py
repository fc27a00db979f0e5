"""Which checkpoints there are, and the few facts a run continues from; no torch."""

import json
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from titan_lite.config.schema import Checkpoint

RUN_STATE_FILE = "run_state.json"
STEP_FOLDER = re.compile(r"step-(\d+)")


@dataclass(kw_only=True)
class RunState:
    """Progress of a run, JSON-serialisable: written by rank 0, equal on all ranks.

    step: optimizer steps done; tokens: tokens trained on by the whole job;
    data: the loader's merged state; loss_scaler: its numbers, in float16 only;
    config: the resolved configuration, for people to read.
    """

    step: int = 0
    tokens: int = 0
    data: dict[str, Any] = field(default_factory=dict)
    loss_scaler: dict[str, float] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)


def saved_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in `folder`, ascending."""
    if not folder.is_dir():
        return []
    matches = (STEP_FOLDER.fullmatch(path.name) for path in folder.iterdir())
    return sorted(int(match[1]) for match in matches if match)


def state_to_resume(section: Checkpoint, folder: Path) -> RunState:
    """The state to continue from, that of step 0 for a fresh start.

    Raises ValueError if the step asked for is missing.
    """
    steps = saved_steps(folder) if section.enable else []
    latest = steps[-1] if steps else 0
    step = latest if section.load_step == "latest" else section.load_step
    if step == 0:
        return RunState()
    if step not in steps:
        found = ", ".join(map(str, steps)) or "none"
        raise ValueError(f"no checkpoint of step {step} in {folder}; steps found: {found}")
    return RunState(**json.loads((folder / f"step-{step}" / RUN_STATE_FILE).read_text()))


def retire_later_steps(folder: Path, step: int) -> Path | None:
    """Moves checkpoints later than `step`, of a branch that is left, to `folder`/retired-TIME.

    Otherwise the next resume would take the newest of them. Returns where they went.
    """
    later = [other for other in saved_steps(folder) if other > step]
    if not later:
        return None
    retired = folder / time.strftime("retired-%Y%m%d-%H%M%S")
    retired.mkdir()
    for other in later:
        (folder / f"step-{other}").rename(retired / f"step-{other}")
    return retired
