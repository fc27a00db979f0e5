"""Documents become token files: read by one process, tokenized by several, written in order.

What is written does not depend on the number of processes, nor on how often the work was broken
off: the folder NAME.incomplete holds what is done.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import datasets
import tokenizers

from titan_lite import __version__
from titan_lite.config.problems import SettingError
from titan_lite.config.schema import Data
from titan_lite.data.encoding import Encoded, Encoder, encode_in_worker, start_worker
from titan_lite.data.file_rows import place_of
from titan_lite.data.readers import Judge
from titan_lite.data.sources import Source, open_dataset, reading
from titan_lite.data.token_files import (
    BAD,
    FORMAT,
    GOOD,
    UNFINISHED,
    Manifest,
    TokenFolder,
)
from titan_lite.data.token_writer import (
    PROGRESS_FILE,
    Chunk,
    Done,
    TargetError,
    Writer,
    resume,
)
from titan_lite.data.tokenizer import Tokenizer
from titan_lite.data.tokenizer_files import load_tokenizer
from titan_lite.runtime.folder_lock import LOCK_FILE, FolderLock
from titan_lite.runtime.stored_files import sync_folder

# What one process gets at a time: enough to hide its cost, little enough to keep all busy.
CHUNK_ROWS = 256
CHUNK_CHARS = 500_000
# Chunks that wait for or after each process.
_AHEAD = 3


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
        raise SettingError(source.key, f"{source.name} is tokenized already")
    tokenizer = load_tokenizer(section.tokenizer_path)
    dataset: Any = open_dataset(source)
    aside = target.with_name(target.name + UNFINISHED)
    try:
        lock = FolderLock(aside, "folder")
    except (ValueError, OSError) as error:
        raise TargetError(str(error)) from error
    try:
        settings = _settings(source, section, tokenizer, shard_tokens)
        done = resume(aside, settings)
        judge = Judge(source, skip=section.on_bad_document == "skip")
        encoder = Encoder(tokenizer, source.kind, section.text_field)
        chunks = _chunks(source, dataset, done)
        with (
            Writer(aside, done, settings, tokenizer.dtype) as writer,
            contextlib.closing(_encoded(chunks, encoder, section, processes)) as results,
        ):
            for chunk, encoded in results:
                for index, use in enumerate(encoded.uses):
                    if use == GOOD:
                        judge.good()
                    elif use == BAD:
                        judge.bad(encoded.reasons[index], place_of(chunk.rows[index], source.files))
                writer.add(chunk, encoded)
                report(done, dataset.num_shards)
            if not done.documents:
                raise SettingError(source.key, f"{source.name} holds no documents")
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


def _settings(
    source: Source, section: Data, tokenizer: Tokenizer, shard_tokens: int
) -> dict[str, Any]:
    """Settings that must be the same for work to resume."""
    return {
        "format": FORMAT,
        "dataset": source.identity,
        "data.text_field": section.text_field,
        "data.on_bad_document": section.on_bad_document,
        "tokenizer": tokenizer.fingerprint,
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
        tokenizer=tokenizer.fingerprint,
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
    chunks: Iterable[Chunk], encoder: Encoder, section: Data, processes: int
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
        initializer=start_worker,
        initargs=(section.tokenizer_path, encoder.kind, section.text_field),
    ) as pool:
        waiting: deque[tuple[Chunk, Future[Encoded]]] = deque()
        try:
            for chunk in chunks:
                waiting.append((chunk, pool.submit(encode_in_worker, chunk.rows)))
                if len(waiting) == _AHEAD * processes:
                    first, encoded = waiting.popleft()
                    yield first, encoded.result()
            for chunk, encoded in waiting:
                yield chunk, encoded.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
