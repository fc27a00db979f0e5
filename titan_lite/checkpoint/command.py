"""`titan-lite checkpoint ls|verify DIR`: lists checkpoints, and verifies their files.

No torch, so it works on any machine that can read the files.
"""

import os
from pathlib import Path

from titan_lite.checkpoint.manifest import MANIFEST_FILE, read_manifest
from titan_lite.checkpoint.state import newest_below, saved_steps
from titan_lite.config.arguments import UsageError, command_parser
from titan_lite.config.schema import Checkpoint
from titan_lite.config.units import format_scaled, format_table
from titan_lite.runtime.stored_files import DamagedError, damaged_files

NO_CHECKPOINT = "no checkpoint in this folder"


def main(argv: list[str]) -> int:
    """Runs the command; returns 1 if a checkpoint is not complete."""
    parser = command_parser(
        "checkpoint",
        "Lists the checkpoints of a run (ls), or reads all their files and compares "
        "them with their checksums (verify). Exit code 1: a checkpoint is not complete.",
        "titan-lite checkpoint ls outputs/checkpoint",
        "titan-lite checkpoint verify outputs/checkpoint",
    )
    parser.add_argument("action", choices=("ls", "verify"))
    parser.add_argument(
        "folder",
        metavar="DIR",
        type=Path,
        help="one checkpoint (step-N), the folder that holds them, or the folder of a run",
    )
    options = parser.parse_args(argv)
    rows = [
        _row(folder, contents=options.action == "verify") for folder in _checkpoints(options.folder)
    ]
    heads = ["checkpoint", "holds", "size", "ranks", "layout", "torch", "state"]
    print(format_table([heads, *rows]))
    return int(any(row[-1] != _sound(options.action == "verify") for row in rows))


def _checkpoints(folder: Path) -> list[Path]:
    """The folders of checkpoints, complete or not, oldest first."""
    default = Checkpoint().folder
    for parent in (folder, folder / default):
        folders = [parent / f"step-{step}" for step in saved_steps(parent)]
        if folders := [*folders, *sorted(parent.glob("step-*.incomplete"))]:
            return folders
    if (folder / MANIFEST_FILE).exists() or folder.name.startswith("step-"):
        return [folder]
    message = f"{NO_CHECKPOINT}, nor in {default}/ below it"
    if newest := newest_below(folder):
        message += f"; the newest further below is {newest}"
    raise UsageError(f"{folder}: {message}")


def _row(folder: Path, *, contents: bool) -> list[str]:
    try:
        manifest = read_manifest(folder)
    except DamagedError as error:
        return [folder.name, *["-"] * 5, str(error)]
    names = sorted(manifest.files) if contents else []
    problems = damaged_files(folder, manifest.files, names, threads=os.cpu_count())
    layout = " x ".join(f"{axis} {size}" for axis, size in manifest.layout.items() if size > 1)
    return [
        folder.name,
        manifest.content,
        format_scaled(manifest.bytes, "B"),
        str(manifest.world_size),
        layout or "one process",
        manifest.versions["torch"],
        "; ".join(problems) or _sound(contents),
    ]


def _sound(contents: bool) -> str:
    return "verified" if contents else "complete"
