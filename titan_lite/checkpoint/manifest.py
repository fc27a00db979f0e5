"""The manifest that makes a folder a complete checkpoint, written last; no torch."""

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
# In a checkpoint that was converted: the tokenizer's files, as they came.
TOKENIZER_FOLDER = "tokenizer"
FORMAT = 1

Degrees = dict[str, int]
"""Degree of each mesh axis."""


@dataclass(frozen=True, kw_only=True)
class CheckpointManifest:
    """The kind of a checkpoint, and its files by their names.

    content: "run" can be resumed from, "model" holds weights only. config: resolved, for people
    to read. versions: of titan_lite, torch and Python. tokenizer: its fingerprint, "" if unknown.
    model: as model_facts gives it; empty in manifests of older versions.
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
    """Writes the manifest, which holds a checksum of itself."""
    content = {"format": FORMAT, **dataclasses.asdict(manifest)}
    content["crc32"] = _own_checksum(content)
    write_text(folder / MANIFEST_FILE, json.dumps(content, indent=1) + "\n")


def read_manifest(folder: Path) -> CheckpointManifest:
    """The manifest of a checkpoint all of whose files are there, in full length.

    Raises DamagedError. What is in the files is checked by `damaged_files`.
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
        raise DamagedError(f"{path} is damaged: its content does not have its checksum {checksum}")
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
