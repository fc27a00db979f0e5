"""The manifest of a checkpoint; it is written last, and makes the checkpoint complete. No torch."""

import dataclasses
import json
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from titan_lite.runtime.stored_files import (
    DamagedError,
    StoredFile,
    check_size,
    hexadecimal,
    write_text,
)

MANIFEST_FILE = "manifest.json"
# Folder of a converted checkpoint with the original files of its tokenizer.
TOKENIZER_FOLDER = "tokenizer"
FORMAT = 1

Degrees = dict[str, int]
"""Degree of each mesh axis."""


@dataclass(frozen=True, kw_only=True)
class CheckpointManifest:
    """A checkpoint's step, content and origin, and its files by name.

    content: "run" can be resumed, "model" has only weights. config: the run's configuration.
    versions: of titan_lite, torch and Python. tokenizer: its fingerprint, "" if unknown. model: the
    result of model_facts; empty in manifests of older versions.
    """

    step: int
    content: str
    world_size: int
    layout: Degrees
    versions: dict[str, str]
    config: dict[str, Any]
    files: dict[str, StoredFile]
    tokenizer: str = ""
    model: dict[str, Any] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(file.bytes for file in self.files.values())


def write_manifest(folder: Path, manifest: CheckpointManifest) -> None:
    """Writes the manifest, with a checksum of itself."""
    content = {"format": FORMAT, **dataclasses.asdict(manifest)}
    content["crc32"] = _own_checksum(content)
    write_text(folder / MANIFEST_FILE, json.dumps(content, indent=1) + "\n")


def read_manifest(folder: Path) -> CheckpointManifest:
    """Reads the manifest of a checkpoint, and checks that all files exist with the right size.

    Raises DamagedError. `damaged_files` checks the files' contents.
    """
    path = folder / MANIFEST_FILE
    if not folder.is_dir():
        raise DamagedError(f"{folder} is not a folder")
    if not path.exists():
        raise DamagedError(f"{folder} has no {MANIFEST_FILE}: it is not a complete checkpoint")
    try:
        content = json.loads(path.read_bytes())
        number, checksum = content.pop("format"), content.pop("crc32")
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise DamagedError(f"{path} is damaged: {error!r}") from error
    if number != FORMAT:
        raise DamagedError(f"{path} has format {number}; this version of titan_lite reads {FORMAT}")
    if checksum != _own_checksum({"format": number, **content}):
        raise DamagedError(f"{path} is damaged: its content does not match its checksum {checksum}")
    files = {name: StoredFile(**file) for name, file in content.pop("files").items()}
    manifest = CheckpointManifest(files=files, **content)
    if folder.name.startswith("step-") and folder.name != f"step-{manifest.step}":
        raise DamagedError(
            f"{folder} is a checkpoint of step {manifest.step}, not of the step in its name"
        )
    for name, file in files.items():
        check_size(folder / name, file)
    return manifest


def _own_checksum(content: dict[str, Any]) -> str:
    return hexadecimal(zlib.crc32(json.dumps(content, sort_keys=True).encode()))
