"""The folder of a run: moves an earlier run to previous/, and writes run.json."""

import json
import logging
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

import titan_lite
from titan_lite.runtime.writing import make_new_folder, writing

logger = logging.getLogger(__name__)

RUN_FILE = "run.json"
# Everything that a run writes directly below its folder; other files are not moved.
RUN_FILES = (RUN_FILE, "metrics.jsonl", "tb", "wandb", "profile")
# Facts that are only stored for the last segment: long, or equal in all segments.
LAST_SEGMENT_ONLY = ("applied", "parameters", "stages", "flops_per_token")


def open_run_folder(folder: Path, *, resume_step: int) -> None:
    """Makes the folder; a fresh start moves an earlier run to `folder`/previous/TIME first.

    Checkpoints are not moved: CheckpointManager retires them if necessary.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        earlier = folder / RUN_FILE
        if resume_step > 0 or not earlier.exists():
            return
        began = time.strftime("%Y%m%d-%H%M%S", time.localtime(earlier.stat().st_mtime))
        aside = make_new_folder(folder / "previous" / began)
        for name in RUN_FILES:
            if (folder / name).exists():
                (folder / name).rename(aside / name)
    logger.info("An earlier run was moved to %s", aside)


def write_run_file(folder: Path, facts: dict[str, Any], *, resumed_from_step: int = 0) -> None:
    """Writes run.json: versions, commit and machine of this process, then `facts`.

    They describe the steps after `resumed_from_step`. `segments` has a record for each part of the
    run between two resumes; steps that are trained twice belong to the later one.
    """
    versions = {
        "titan_lite": titan_lite.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    run = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": versions,
        "git_commit": git_commit(),
        "environment": {
            "system": f"{platform.system()} {platform.machine()}",
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
        },
        "resumed_from_step": resumed_from_step,
        **facts,
    }
    path = folder / RUN_FILE
    segments = [*_segments_before(resumed_from_step, path), _segment(run)]
    _write(path, run | {"segments": segments})


def update_run_file(folder: Path, facts: dict[str, Any]) -> None:
    """Replaces `facts` in run.json; for facts that are only known after the run has started."""
    path = folder / RUN_FILE
    _write(path, json.loads(path.read_text()) | facts)


def _segments_before(step: int, path: Path) -> list[dict[str, Any]]:
    """Returns the segments (one per start of the run) in run.json that started before a step.

    Empty if run.json is missing or damaged.
    """
    if not path.exists():
        return []
    try:
        run = json.loads(path.read_text())
        segments = run.get("segments") or [_segment(run)]
        return [segment for segment in segments if segment["resumed_from_step"] < step]
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        logger.warning(
            "%s is damaged; its record of earlier starts of this run is lost: %r", path, error
        )
        return []


def _segment(run: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in run.items() if key not in LAST_SEGMENT_ONLY}


def _write(path: Path, run: dict[str, Any]) -> None:
    """Writes a temporary file and renames it, so that run.json is never incomplete."""
    with writing(path):
        aside = path.with_suffix(".incomplete")
        aside.write_text(json.dumps(run, indent=2) + "\n")
        aside.replace(path)


def git_commit() -> str | None:
    """Commit of the package's checkout, with "+changes" if it was edited; None outside git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40"]
    try:
        result = subprocess.run(
            [*command, "--exclude=*", "--dirty=+changes"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()
