"""Documents become token files: read by one process, tokenized by several, written in order.

What is written does not depend on the number of processes, nor on how often the work was broken
off: the folder NAME.incomplete holds what is done, and progress.json how much of it counts.
"""

import contextlib
import dataclasses
import json
import os
import signal
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, BinaryIO

import datasets
import numpy as np
import numpy.typing as npt
import tokenizers

from titan_lite import __version__
from titan_lite.config.schema import Data
from titan_lite.data.documents import BadDocument, Kind, is_blank, text_of
from titan_lite.data.readers import Judge
from titan_lite.data.sources import Source, open_dataset, reading
from titan_lite.data.token_files import (
    BAD,
    BLANK,
    GOOD,
    ROW,
    UNFINISHED,
    Manifest,
    Shard,
    TokenFolder,
    shard_files,
)
from titan_lite.data.tokenizer import Tokenizer, load_tokenizer
from titan_lite.runtime.folder_lock import LOCK_FILE, FolderLock
from titan_lite.runtime.stored_files import hexadecimal, sync_folder, write_text

PROGRESS_FILE = "progress.json"
COMMIT_SECONDS = 5.0
# What one process gets at a time: enough to hide its cost, little enough to keep all busy.
CHUNK_ROWS = 256
CHUNK_CHARS = 500_000
# Chunks that wait for or after each process.
_AHEAD = 3


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
    """Of the source's files, the last of which is being read."""
    cursor: dict[str, Any] | None = None
    """Place in that file; None: its start."""
    shards: list[Shard] = field(default_factory=list)
    """Complete ones."""
    open_rows: int = 0
    open_tokens: int = 0
    """Of the shard that is being written, these and its files' running checksums."""
    open_crc32: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Chunk:
    """Rows of one file, and the place after them."""

    rows: list[dict[str, Any]]
    size: int
    """Characters."""
    cursor: dict[str, Any] | None
    """None: the file has no more."""


@dataclass(frozen=True)
class Encoded:
    """What became of a chunk."""

    uses: npt.NDArray[np.uint8]
    lengths: npt.NDArray[np.int64]
    tokens: npt.NDArray[Any]
    bytes: int
    reasons: dict[int, str]
    """Why rows cannot be used, by their index."""


def tokenize(
    source: Source,
    section: Data,
    target: Path,
    *,
    processes: int,
    shard_tokens: int,
    report: Callable[[Done, int], None],
) -> Manifest:
    """Writes the folder `target`, or goes on where an earlier call was broken off.

    `report` is called after each chunk, with what is done and the number of the source's files.
    Raises TargetError, and ValueError where a document or the tokenizer cannot be used.
    """
    if target.exists():
        raise TargetError(f"{target} exists already: name a folder that does not")
    if source.stored:
        raise ValueError(f"{source.key}: {source.name} is tokenized already")
    aside = target.with_name(target.name + UNFINISHED)
    try:
        lock = FolderLock(aside, "end it, or name another folder")
    except (ValueError, OSError) as error:
        raise TargetError(str(error)) from error
    try:
        tokenizer = load_tokenizer(section.tokenizer_path)
        settings = _settings(source, section, tokenizer, shard_tokens)
        done = _resume(aside, settings)
        dataset: Any = open_dataset(source)
        judge = Judge(source, skip=section.on_bad_document == "skip")
        encoder = _Encoder(tokenizer, source.kind, section.text_field)
        chunks = _chunks(source, dataset, done)
        with (
            _Writer(aside, done, settings, tokenizer.dtype) as writer,
            contextlib.closing(_encoded(chunks, encoder, section, processes)) as results,
        ):
            for chunk, encoded in results:
                for index, use in enumerate(encoded.uses):
                    if use == GOOD:
                        judge.good()
                    elif use == BAD:
                        judge.bad(chunk.rows[index], encoded.reasons[index])
                writer.add(chunk, encoded)
                report(done, dataset.num_shards)
            writer.finish()
        _manifest(source, section, tokenizer, done).write(aside)
        manifest = TokenFolder(aside).manifest
        (aside / PROGRESS_FILE).unlink()
        (aside / LOCK_FILE).unlink()
        sync_folder(aside)
        aside.rename(target)
        sync_folder(target.parent)
    finally:
        lock.release()
    return manifest


class _Encoder:
    """Tokenizes chunks, in whatever process."""

    def __init__(self, tokenizer: Tokenizer, kind: Kind, text_field: str) -> None:
        self._tokenizer, self.kind, self._field = tokenizer, kind, text_field

    def __call__(self, rows: list[dict[str, Any]]) -> Encoded:
        uses = np.full(len(rows), GOOD, np.uint8)
        texts, reasons = [], {}
        for index, row in enumerate(rows):
            try:
                if is_blank(row, self.kind):
                    uses[index] = BLANK
                else:
                    texts.append(text_of(row, self.kind, self._field))
            except BadDocument as error:
                uses[index], reasons[index] = BAD, str(error)
        documents = self._tokenizer.encode_documents(texts)
        lengths = np.zeros(len(rows), np.int64)
        lengths[uses == GOOD] = [len(document) for document in documents]
        tokens = np.concatenate([np.empty(0, np.uint32), *documents])
        num_bytes = sum(len(text.encode(errors="replace")) for text in texts)
        return Encoded(uses, lengths, tokens.astype(self._tokenizer.dtype), num_bytes, reasons)


class _Writer:
    """Appends to the open shard, and from time to time makes what is written count."""

    def __init__(
        self, folder: Path, done: Done, settings: dict[str, Any], dtype: np.dtype[Any]
    ) -> None:
        self._folder, self._done, self._settings = folder, done, settings
        self._sizes = dtype.itemsize, ROW.itemsize
        self._files: tuple[BinaryIO, ...] = ()
        self._committed = time.monotonic()

    def __enter__(self) -> "_Writer":
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


def _resume(folder: Path, settings: dict[str, Any]) -> Done:
    """What an earlier call did in a folder; TargetError where it was asked for something else."""
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


def _settings(
    source: Source, section: Data, tokenizer: Tokenizer, shard_tokens: int
) -> dict[str, Any]:
    """What must be the same for work to go on."""
    return {
        "dataset": source.identity,
        "data.text_field": section.text_field,
        "data.on_bad_document": section.on_bad_document,
        "tokenizer": tokenizer.identity,
        "tokens of a shard": shard_tokens,
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    return {
        "titan_lite": __version__,
        "datasets": datasets.__version__,
        "tokenizers": tokenizers.__version__,
    }


def _manifest(source: Source, section: Data, tokenizer: Tokenizer, done: Done) -> Manifest:
    return Manifest(
        tokenizer=tokenizer.identity,
        tokenizer_path=section.tokenizer_path,
        source=source.identity,
        source_name=source.name,
        text_field=section.text_field,
        dtype=tokenizer.dtype.name,
        documents=done.documents,
        tokens=done.tokens,
        bytes=done.bytes,
        skipped=done.skipped,
        rows_per_file=done.rows_per_file[:-1],
        shards=done.shards,
        versions=_versions(),
    )


def _chunks(source: Source, dataset: Any, done: Done) -> Iterator[Chunk]:
    """The rows that are not done yet, file by file."""
    cursor = done.cursor
    for number in range(len(done.rows_per_file) - 1, dataset.num_shards):
        file = dataset.shard(num_shards=dataset.num_shards, index=number, contiguous=False)
        file.load_state_dict(cursor)
        cursor = None
        rows: list[dict[str, Any]] = []
        size = 0
        with reading(source):
            for row in file:
                rows.append(row)
                size += sum(len(value) for value in row.values() if isinstance(value, str))
                if len(rows) == CHUNK_ROWS or size > CHUNK_CHARS:
                    yield Chunk(rows, size, file.state_dict())
                    rows, size = [], 0
        yield Chunk(rows, size, None)


def _encoded(
    chunks: Iterable[Chunk], encoder: _Encoder, section: Data, processes: int
) -> Generator[tuple[Chunk, Encoded], None, None]:
    """Chunks in their order, with what became of them."""
    if processes == 1:
        for chunk in chunks:
            yield chunk, encoder(chunk.rows)
        return
    # No fork: it would copy whatever locks the threads of libraries hold.
    with ProcessPoolExecutor(
        processes,
        get_context("spawn"),
        initializer=_start_worker,
        initargs=(section.tokenizer_path, encoder.kind, section.text_field),
    ) as pool:
        waiting: deque[tuple[Chunk, Future[Encoded]]] = deque()
        try:
            for chunk in chunks:
                waiting.append((chunk, pool.submit(_encode_in_worker, chunk.rows)))
                if len(waiting) == _AHEAD * processes:
                    first, encoded = waiting.popleft()
                    yield first, encoded.result()
            for chunk, encoded in waiting:
                yield chunk, encoded.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


_worker: _Encoder


def _start_worker(tokenizer_path: str, kind: Kind, text_field: str) -> None:
    global _worker
    # The parent answers Ctrl-C. A worker whose parent was killed would wait for it forever.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker = _Encoder(load_tokenizer(tokenizer_path), kind, text_field)


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_in_worker(rows: list[dict[str, Any]]) -> Encoded:
    return _worker(rows)
