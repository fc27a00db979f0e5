"""Files whose size and checksum are kept in a manifest next to them; no torch."""

import os
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

_CHUNK = 4 * 2**20


class DamagedError(ValueError):
    """A folder is not complete; the message names it, and the file that is wrong."""


@dataclass(frozen=True)
class StoredFile:
    """A file as it was written. crc32: of its content, 8 hexadecimal digits."""

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


def stored_file(path: Path) -> StoredFile:
    """Size and checksum of a file, which is read."""
    size = checksum = 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            size += len(chunk)
            checksum = zlib.crc32(chunk, checksum)
    return StoredFile(size, hexadecimal(checksum))


def sync_folder(folder: Path) -> None:
    """Waits until the names in a folder are on the disk, too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_size(path: Path, file: StoredFile) -> None:
    """DamagedError for a file that is missing or of another size; reads nothing."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DamagedError(f"{path} is missing, or cannot be read: {error.strerror}") from error
    if size != file.bytes:
        raise DamagedError(f"{path} is damaged: it has {size:,} bytes, expected {file.bytes:,}")


def damaged_files(
    folder: Path, files: Mapping[str, StoredFile], names: Iterable[str], *, threads: int | None = 1
) -> list[str]:
    """A sentence for each of the named files whose content is not what was written; reads all.

    threads: number of files that are read at once; None: as ThreadPoolExecutor chooses.
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
    """A checksum as manifests have it."""
    return f"{crc32:08x}"
