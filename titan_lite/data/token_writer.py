"""Appends to token files so that work which was broken off can be gone on with.

A folder that is being written holds a progress.json: what of its files counts. What was written
after the last one is cut off when the work goes on.
"""

import dataclasses
import json
import os
import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from titan_lite.data.encoding import Encoded
from titan_lite.data.token_files import GOOD, ROW, Shard, shard_files
from titan_lite.runtime.stored_files import hexadecimal, write_text

PROGRESS_FILE = "progress.json"
COMMIT_SECONDS = 5.0


class TargetError(ValueError):
    """A folder that cannot be written, or whose content does not belong to what is asked for."""


@dataclass
class Done:
    """How far the work is; everything counts from the source's first document."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    """UTF-8 text of all documents."""
    skipped: int = 0
    read: int = 0
    """Characters of the source's rows, whatever they are."""
    rows_per_file: list[int] = field(default_factory=lambda: [0])
    """Rows of each of the source's files, the last of which is being read."""
    cursor: dict[str, Any] | None = None
    """Place in that file; None: its start."""
    shards: list[Shard] = field(default_factory=list)
    """Complete ones."""
    open_rows: int = 0
    open_tokens: int = 0
    """Rows and tokens of the shard that is being written, and its files' running checksums."""
    open_crc32: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Chunk:
    """Rows of one file, and the place after them."""

    rows: list[dict[str, Any]]
    size: int
    """Characters."""
    cursor: dict[str, Any] | None
    """None: the file has no more."""


class Writer:
    """Appends to the open shard, and from time to time makes what is written count."""

    def __init__(
        self, folder: Path, done: Done, settings: dict[str, Any], dtype: np.dtype[Any]
    ) -> None:
        self._folder, self._done, self._settings = folder, done, settings
        self._sizes = dtype.itemsize, ROW.itemsize
        self._files: tuple[BinaryIO, ...] = ()
        self._committed = time.monotonic()

    def __enter__(self) -> "Writer":
        self._open()
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            file.close()

    def add(self, chunk: Chunk, encoded: Encoded) -> None:
        """Writes a chunk; a document is never split between two shards."""
        done, first = self._done, 0
        ends = np.cumsum(encoded.lengths)
        limit = self._settings["tokens of a shard"]
        while first < len(ends):
            before = int(ends[first - 1]) if first else 0
            # Rows up to the one with which the shard is full.
            room = limit - done.open_tokens
            last = min(int(np.searchsorted(ends - before, room)) + 1, len(ends))
            rows = np.empty(last - first, ROW)
            rows["end"] = ends[first:last] - before + done.open_tokens
            rows["use"] = encoded.uses[first:last]
            self._write(encoded.tokens[before : int(ends[last - 1])], rows)
            first = last
            if done.open_tokens >= limit:
                self._close_shard()
        done.documents += int(np.count_nonzero(encoded.uses == GOOD))
        done.skipped += len(encoded.reasons)
        done.tokens += int(encoded.lengths.sum())
        done.bytes += encoded.bytes
        done.rows_per_file[-1] += len(chunk.rows)
        done.read += chunk.size
        done.cursor = chunk.cursor
        if chunk.cursor is None:
            done.rows_per_file.append(0)
        if time.monotonic() - self._committed > COMMIT_SECONDS:
            self._commit()

    def finish(self) -> None:
        """Closes the last shard."""
        if self._done.open_rows:
            self._close_shard()
        self._commit()
        for file, name in zip(self._files, shard_files(len(self._done.shards)), strict=True):
            file.close()
            (self._folder / name).unlink()

    def _write(self, tokens: npt.NDArray[Any], rows: npt.NDArray[np.void]) -> None:
        done = self._done
        contents = tokens.tobytes(), rows.tobytes()
        checksums = []
        for file, content, crc32 in zip(self._files, contents, done.open_crc32, strict=True):
            file.write(content)
            checksums.append(zlib.crc32(content, crc32))
        done.open_crc32 = checksums[0], checksums[1]
        done.open_rows += len(rows)
        done.open_tokens += len(tokens)

    def _close_shard(self) -> None:
        done = self._done
        first, second = map(hexadecimal, done.open_crc32)
        self._sync()
        done.shards.append(Shard(done.open_rows, done.open_tokens, (first, second)))
        done.open_rows, done.open_tokens, done.open_crc32 = 0, 0, (0, 0)
        for file in self._files:
            file.close()
        self._open()

    def _open(self) -> None:
        """The files of the open shard, without what was written after the last commit."""
        done = self._done
        names = shard_files(len(done.shards))
        counts = done.open_tokens, done.open_rows
        files = []
        for name, count, size in zip(names, counts, self._sizes, strict=True):
            file = (self._folder / name).open("ab")
            files.append(file)
            if file.tell() < count * size:
                raise TargetError(
                    f"{self._folder / name} has {file.tell():,} bytes where {count * size:,} were "
                    f"written: remove {self._folder} to begin again"
                )
            file.truncate(count * size)
        self._files = tuple(files)

    def _sync(self) -> None:
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())

    def _commit(self) -> None:
        self._sync()
        content = {"settings": self._settings, "done": dataclasses.asdict(self._done)}
        path = self._folder / PROGRESS_FILE
        write_text(path.with_suffix(".new"), json.dumps(content))
        path.with_suffix(".new").replace(path)
        self._committed = time.monotonic()


def resume(folder: Path, settings: dict[str, Any]) -> Done:
    """Progress of an earlier call in a folder; TargetError where its settings were others."""
    path = folder / PROGRESS_FILE
    if not path.exists():
        return Done()
    try:
        content = json.loads(path.read_bytes())
        found, done = content["settings"], content["done"]
        shards = [Shard(s["rows"], s["tokens"], tuple(s["crc32"])) for s in done.pop("shards")]
        resumed = Done(**done, shards=shards)
    except (ValueError, KeyError, TypeError) as error:
        raise TargetError(
            f"{path} is damaged ({error!r}): remove {folder} to begin again"
        ) from None
    differing = [
        f"{key} was {found.get(key)!r} and is {value!r}"
        for key, value in settings.items()
        if value != found.get(key)
    ]
    if differing:
        raise TargetError(
            f"{folder} holds the beginning of something else: {'; '.join(differing)}; remove it, "
            "or name another folder"
        )
    return resumed
