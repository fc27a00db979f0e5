"""Writes the documents of a source as a dataset of token ids, with several processes.

A process tokenizes whole files of the source, or takes turns with others at the parts of a file. A
part becomes an Arrow file. An interrupted call resumes after the parts that are complete. The
result depends neither on the number of processes nor on interruptions.
"""

import itertools
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import (
    FIRST_COMPLETED,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import get_context
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow
from pyarrow import compute, ipc
from tqdm import tqdm

from titan_lite import __version__
from titan_lite.config.problems import SettingError
from titan_lite.config.schema import Data
from titan_lite.data.documents import TOKENS_FIELD
from titan_lite.data.readers import BadDocumentPolicy
from titan_lite.data.settings import changed_values
from titan_lite.data.sources import Source, reading
from titan_lite.data.token_folder import (
    FORMAT,
    MANIFEST_FILE,
    PROGRESS_FILE,
    UNFINISHED,
    Shard,
    TokenManifest,
    shard_name,
)
from titan_lite.data.tokenizer import Tokenizer
from titan_lite.data.tokenizer_files import load_tokenizer
from titan_lite.runtime.folder_lock import FolderLock
from titan_lite.runtime.parent import end_with_parent, making_locks
from titan_lite.runtime.stored_files import stored_file, sync_folder, write_text

if TYPE_CHECKING:
    from datasets import Features

# Rows and characters of a record batch.
BATCH_ROWS = 1000
BATCH_CHARS = 2_000_000
# Seconds between lines of a log; a terminal's line is redrawn more often.
LOG_SECONDS = 30.0
Report = Callable[[int, int], None]
"""A function called with the numbers of new documents and tokens."""


class TargetError(ValueError):
    """A folder that cannot be written, or was started with different settings."""


@dataclass(frozen=True)
class WorkerSettings:
    """The arguments of every process. folder: the unfinished one."""

    source: Source
    section: Data
    folder: Path
    shard_size: int
    schema: pyarrow.Schema


@dataclass(frozen=True)
class Task:
    """Every `turns`-th part of the source's file `number`, from part `turn` on."""

    number: int
    turn: int
    turns: int

    def marker(self, folder: Path) -> Path:
        """Returns the file that marks the task as complete."""
        return folder / f"{self.number:05d}.{self.turn}-of-{self.turns}"


def tokenize(
    source: Source, section: Data, target: Path, *, processes: int, shard_size: int
) -> TokenManifest:
    """Writes the folder `target`, or resumes an earlier call.

    shard_size: characters after which a part ends. Raises TargetError, and SettingError for a
    document or tokenizer that cannot be used.
    """
    if target.exists():
        raise TargetError(f"{target} exists already: choose another folder")
    if source.tokens_field:
        raise SettingError(source.key, f"{source.name} is tokenized already")
    tokenizer = load_tokenizer(section.tokenizer_path)
    folder = target.with_name(target.name + UNFINISHED)
    try:
        lock = FolderLock(folder, "folder")
    except (ValueError, OSError) as error:
        raise TargetError(str(error)) from error
    try:
        settings = {
            "format": FORMAT,
            "dataset": source.identity,
            "data.text_field": section.text_field,
            "tokenizer": tokenizer.fingerprint,
            "--shard-size": shard_size,
            "versions": _versions(),
        }
        _check_settings(folder, settings)
        features = _features(tokenizer)
        job = WorkerSettings(source, section, folder, shard_size, features.arrow_schema)
        turns = -(-processes // source.num_files)
        tasks = [
            Task(number, turn, turns) for number in range(source.num_files) for turn in range(turns)
        ]
        _run(job, tasks, processes)
        with ThreadPoolExecutor(processes) as pool:
            files = [
                list(pool.map(_shard, sorted(folder.glob(f"{number:05d}-*.arrow"))))
                for number in range(source.num_files)
            ]
        manifest = TokenManifest(
            tokenizer=tokenizer.fingerprint,
            tokenizer_path=section.tokenizer_path,
            source=source.identity,
            source_name=source.name,
            text_field=section.text_field,
            dtype=tokenizer.dtype.name,
            files=files,
            versions=_versions(),
        )
        if not manifest.documents:
            raise SettingError(source.key, f"{source.name} has no documents")
        _finish(folder, manifest, features)
        folder.rename(target)
        sync_folder(target.parent)
    finally:
        lock.release()
    return manifest


def _versions() -> dict[str, str]:
    versions = {name: version(name) for name in ("datasets", "tokenizers")}
    return {"titan_lite": __version__, **versions}


def _features(tokenizer: Tokenizer) -> "Features":
    # Imported here, so that the processes that tokenize start faster.
    import datasets

    ids = datasets.Sequence(datasets.Value(tokenizer.dtype.name))
    return datasets.Features({TOKENS_FIELD: ids})


def _check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Stores the settings in a new folder; TargetError if an earlier call had other settings."""
    path = folder / PROGRESS_FILE
    if not path.exists():
        write_text(path, json.dumps(settings))
        return
    try:
        earlier = dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise TargetError(f"{path} is damaged ({error!r}): remove {folder}") from None
    if differing := changed_values(settings, earlier):
        raise TargetError(
            f"{folder} was started with different settings: {'; '.join(differing.values())}; "
            f"remove {folder}, or choose another --output"
        )


def _run(job: WorkerSettings, tasks: list[Task], processes: int) -> None:
    """Runs the tasks that are not complete, with a progress bar on stderr."""
    due = [task for task in tasks if not task.marker(job.folder).exists()]
    seconds = 0.5 if sys.stderr.isatty() else LOG_SECONDS
    with tqdm(total=len(tasks), initial=len(tasks) - len(due), mininterval=seconds) as bar:
        if processes == 1:
            counts = [0, 0]

            def report(documents: int, tokens: int) -> None:
                counts[:] = counts[0] + documents, counts[1] + tokens
                _show(bar, counts)

            worker = _Worker(job, report)
            for task in due:
                worker.write(task)
                bar.update()
            return
        # Not fork, which would copy locks held by the threads of libraries.
        context = get_context("spawn")
        with making_locks():
            shared = context.Array("q", 2)
            workers = ProcessPoolExecutor(
                processes, context, initializer=_start_worker, initargs=(job, shared)
            )
        with workers as pool:
            pending = {pool.submit(_write, task) for task in due}
            try:
                while pending:
                    done, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
                    for future in done:
                        future.result()
                    _show(bar, shared[:])
                    bar.update(len(done))
            finally:
                pool.shutdown(wait=False, cancel_futures=True)


def _show(bar: "tqdm[None]", counts: list[int]) -> None:
    bar.set_postfix_str(f"{counts[0]:,} documents, {counts[1]:,} tokens", refresh=False)
    bar.update(0)


def _start_worker(job: WorkerSettings, counts: Any) -> None:
    global _worker
    # The parent handles Ctrl-C. A worker whose parent was killed would wait for it forever.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
    # The parent has logged the warnings about the tokenizer and the files.
    logging.getLogger("titan_lite").setLevel(logging.ERROR)

    def report(documents: int, tokens: int) -> None:
        with counts.get_lock():
            counts[0] += documents
            counts[1] += tokens

    _worker = _Worker(job, report)


def _write(task: Task) -> None:
    _worker.write(task)


class _Worker:
    """Tokenizes in one process."""

    def __init__(self, job: WorkerSettings, report: Report) -> None:
        self._job, self._report = job, report
        self._tokenizer = load_tokenizer(job.section.tokenizer_path)

    def write(self, task: Task) -> None:
        """Writes the parts of a task that are not complete yet."""
        source = self._job.source
        file = source.open(task.number, source.num_files)
        policy = BadDocumentPolicy(source, self._job.section)
        parts = itertools.groupby(self._numbered(file), key=itemgetter(0))
        for part, (_, rows) in enumerate(parts):
            path = self._job.folder / shard_name(task.number, part)
            if part % task.turns == task.turn and not path.exists():
                self._write_part(path, (self._text(row, file, policy) for _, row in rows))
        empty = self._job.folder / shard_name(task.number, 0)
        if task.turn == 0 and not empty.exists():
            self._write_part(empty, ())
        task.marker(self._job.folder).touch()

    def _numbered(self, file: Iterable[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yields rows, each with the number of its part."""
        size = 0
        with reading(self._job.source):
            for row in file:
                yield size // self._job.shard_size, row
                size += sum(len(value) for value in row.values() if isinstance(value, str))

    def _text(self, row: dict[str, Any], file: Any, policy: BadDocumentPolicy) -> str:
        """Returns the text of a row; "" for a bad document."""
        text = policy.document(row, file)
        if not isinstance(text, str | None):
            source = self._job.source
            raise SettingError(source.key, f"{source.name} is tokenized already")
        return text or ""

    def _write_part(self, path: Path, texts: Iterable[str]) -> None:
        unfinished = path.with_suffix(".new")
        with unfinished.open("wb") as file:
            with ipc.new_stream(file, self._job.schema) as stream:
                for batch in _batches(texts):
                    good = [text for text in batch if text]
                    dtype = self._tokenizer.dtype
                    encoded = iter(self._tokenizer.encode_documents(good))
                    documents = [next(encoded).astype(dtype) if text else None for text in batch]
                    array = pyarrow.array(documents, self._job.schema.types[0])
                    stream.write_batch(pyarrow.record_batch([array], schema=self._job.schema))
                    self._report(len(good), len(array.flatten()))
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)


_worker: _Worker


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if len(batch) == BATCH_ROWS or size > BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _shard(path: Path) -> Shard:
    with pyarrow.memory_map(str(path)) as file:
        column = ipc.open_stream(file).read_all().column(0)
        tokens = compute.sum(compute.list_value_length(column)).as_py() or 0
        return Shard(len(column), column.null_count, tokens, stored_file(path))


def _finish(folder: Path, manifest: TokenManifest, features: "Features") -> None:
    """Completes the folder: writes the files of a saved dataset and the manifest."""
    import datasets

    datasets.DatasetInfo(features=features).write_to_directory(str(folder))
    state: dict[str, Any] = {
        "_data_files": [{"filename": name} for name in manifest.shards],
        "_fingerprint": "".join(shard.file.crc32 for shard in manifest.shards.values())[:32],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    write_text(folder / "state.json", json.dumps(state, indent=1))
    manifest.write(folder)
    kept = {*manifest.shards, "dataset_info.json", "state.json", MANIFEST_FILE}
    for file in folder.iterdir():
        if file.name not in kept:
            file.unlink()
    sync_folder(folder)
