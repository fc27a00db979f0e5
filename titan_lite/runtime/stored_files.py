"""Files with size and checksum in a manifest. Does not import torch."""

import json
import os
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_CHUNK = 4 * 2**20


class DamagedError(ValueError):
    """A folder is incomplete or damaged; the message names it, and the file at fault."""


@dataclass(frozen=True)
class StoredFile:
    """Size and checksum of a file when it was written. crc32: 8 hexadecimal digits."""

    bytes: int
    crc32: str


def write_text(path: Path, text: str) -> StoredFile:
    """Writes a file, and waits until it is on the disk."""
    return write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> StoredFile:
    """Writes a file, and waits until it is on the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return StoredFile(len(content), hexadecimal(zlib.crc32(content)))


def json_object(path: Path, content: bytes) -> dict[str, Any]:
    """Parses the content of a file; ValueError naming the file if it is not a JSON object."""
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise ValueError(f"{path} is not a JSON object")
    return document


def stored_file(path: Path) -> StoredFile:
    """Reads a file; returns its size and checksum."""
    size = checksum = 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            size += len(chunk)
            checksum = zlib.crc32(chunk, checksum)
    return StoredFile(size, hexadecimal(checksum))


def sync_folder(folder: Path) -> None:
    """Waits until a folder's entries are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_size(path: Path, file: StoredFile) -> None:
    """Raises DamagedError if a file is missing or has another size; does not read it."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DamagedError(f"{path} is missing, or cannot be read: {error.strerror}") from error
    if size != file.bytes:
        raise DamagedError(f"{path} is damaged: it has {size:,} bytes, expected {file.bytes:,}")


def damaged_files(
    folder: Path, files: Mapping[str, StoredFile], names: Iterable[str], *, threads: int | None = 1
) -> list[str]:
    """Reads the named files; returns a sentence for each whose checksum is wrong.

    threads: number of files that are read at once; None: ThreadPoolExecutor's default.
    """

    def problem(name: str) -> str:
        path, expected = folder / name, files[name].crc32
        try:
            checksum = stored_file(path).crc32
        except OSError as error:
            return f"{path} cannot be read: {error}"
        if checksum != expected:
            return f"{path} is damaged: its checksum is {checksum}, expected {expected}"
        return ""

    with ThreadPoolExecutor(threads) as pool:
        return list(filter(None, pool.map(problem, names)))


def hexadecimal(crc32: int) -> str:
    """Formats a checksum as in manifests."""
    return f"{crc32:08x}"
