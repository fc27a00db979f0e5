"""The folder of a run: an earlier run is moved aside, and what this one is goes to run.json."""

import json
import logging
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

import titan_lite
from titan_lite.runtime.writing import writing

logger = logging.getLogger(__name__)

RUN_FILE = "run.json"
# Everything that a run writes directly below its folder; a file of the user's stays where it is.
RUN_FILES = (RUN_FILE, "metrics.jsonl", "tb", "wandb", "profile")


def open_run_folder(folder: Path, *, resume_step: int) -> None:
    """Makes the folder; a fresh start moves an earlier run to `folder`/previous/TIME first.

    Checkpoints are not the folder's: they stay, or are retired by their manager.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        earlier = folder / RUN_FILE
        if resume_step > 0 or not earlier.exists():
            return
        began = time.strftime("%Y%m%d-%H%M%S", time.localtime(earlier.stat().st_mtime))
        aside = folder / "previous" / began
        aside.mkdir(parents=True)
        for name in RUN_FILES:
            if (folder / name).exists():
                (folder / name).rename(aside / name)
    logger.info("An earlier run was moved to %s", aside)


def write_run_file(folder: Path, facts: dict[str, Any]) -> None:
    """Writes run.json: `facts` after the versions, commit and machine that produced the run."""
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
        **facts,
    }
    _write(folder / RUN_FILE, run)


def update_run_file(folder: Path, facts: dict[str, Any]) -> None:
    """Replaces `facts` in run.json, for what is only known once the run has begun."""
    path = folder / RUN_FILE
    _write(path, json.loads(path.read_text()) | facts)


def _write(path: Path, run: dict[str, Any]) -> None:
    with writing(path):
        path.write_text(json.dumps(run, indent=2) + "\n")


def git_commit() -> str | None:
    """Commit of the checkout that the package runs from, "+changes" if edited, None outside git."""
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
