"""What makes a folder a complete checkpoint: a manifest of its files, written last; no torch."""

import dataclasses
import json
import os
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST_FILE = "manifest.json"
FORMAT = 1
CHUNK = 4 * 2**20

Layout = dict[str, int]
"""Degree of each mesh axis."""


class DamagedError(ValueError):
    """A folder is no complete checkpoint; the message names it, and the file that is wrong."""


@dataclass(frozen=True)
class StoredFile:
    """A file as it was written. crc32: of its content, 8 hexadecimal digits."""

    bytes: int
    crc32: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint is and which files it has, by their names.

    content: "run" can be resumed from, "model" holds weights only. config: resolved, for people
    to read. versions: of titan_lite, torch and Python.
    """

    step: int
    content: str
    world_size: int
    layout: Layout
    versions: dict[str, str]
    config: dict[str, Any]
    files: dict[str, StoredFile]

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(file.bytes for file in self.files.values())


def write_text(path: Path, text: str) -> StoredFile:
    """Writes a file, and waits until it is on the disk."""
    content = text.encode()
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return StoredFile(len(content), hexadecimal(zlib.crc32(content)))


def sync_folder(folder: Path) -> None:
    """Waits until the names in a folder are on the disk, too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes the manifest, which holds a checksum of itself."""
    content = {"format": FORMAT, **dataclasses.asdict(manifest)}
    content["crc32"] = _own_checksum(content)
    write_text(folder / MANIFEST_FILE, json.dumps(content, indent=1) + "\n")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint all of whose files are there, in full length.

    Raises DamagedError. What is in the files is for `damaged_files` to say.
    """
    path = folder / MANIFEST_FILE
    if not folder.is_dir():
        raise DamagedError(f"{folder} is no folder")
    if not path.exists():
        raise DamagedError(f"{folder} has no {MANIFEST_FILE}: no checkpoint that was completed")
    try:
        content = json.loads(path.read_bytes())
        number, checksum = content.pop("format"), content.pop("crc32")
    except (ValueError, AttributeError, KeyError) as error:
        raise DamagedError(f"{path} is damaged: {error!r}") from error
    if number != FORMAT:
        raise DamagedError(f"{path} has format {number}; this version of titan_lite reads {FORMAT}")
    if checksum != _own_checksum({"format": number, **content}):
        raise DamagedError(f"{path} is damaged: its content does not have its checksum {checksum}")
    files = {name: StoredFile(**file) for name, file in content.pop("files").items()}
    manifest = Manifest(files=files, **content)
    if folder.name.startswith("step-") and folder.name != f"step-{manifest.step}":
        raise DamagedError(f"{folder} is not what its name says: a checkpoint of {manifest.step}")
    for name, file in files.items():
        _check_size(folder / name, file)
    return manifest


def damaged_files(folder: Path, manifest: Manifest, names: Iterable[str]) -> list[str]:
    """A sentence for each of the named files whose content is not what was written; reads all."""
    found = []
    for name in names:
        checksum, path = 0, folder / name
        try:
            with path.open("rb", buffering=0) as file:
                while chunk := file.read(CHUNK):
                    checksum = zlib.crc32(chunk, checksum)
        except OSError as error:
            found.append(f"{path} cannot be read: {error}")
            continue
        expected = manifest.files[name].crc32
        if hexadecimal(checksum) != expected:
            found.append(
                f"{path} is damaged: its checksum is {hexadecimal(checksum)}, and was {expected}"
            )
    return found


def hexadecimal(crc32: int) -> str:
    """A checksum as manifests have it."""
    return f"{crc32:08x}"


def _own_checksum(content: dict[str, Any]) -> str:
    return hexadecimal(zlib.crc32(json.dumps(content, sort_keys=True).encode()))


def _check_size(path: Path, file: StoredFile) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DamagedError(f"{path} is missing, or cannot be read: {error.strerror}") from error
    if size != file.bytes:
        raise DamagedError(f"{path} has {size:,} bytes, and was written with {file.bytes:,}")
