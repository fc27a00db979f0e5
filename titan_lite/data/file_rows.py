"""Rows of local files, from any place in them: lines and texts, undecoded, or a column's values."""

import bz2
import codecs
import gzip
import io
import itertools
import json
import lzma
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, cast

from titan_lite.data.documents import RAW_ENCODING
from titan_lite.data.files import compression_of, format_of, plain_suffix

_BATCH_ROWS = 1024
_BOM = codecs.BOM_UTF8.decode(RAW_ENCODING)


class UnreadableError(ValueError):
    """A file that cannot be opened, or is damaged."""


class FileRows:
    """The rows of files in their order; what readers use of a datasets.IterableDataset.

    step, offset: of the rows of all files, every `step`-th, from number `offset` on.
    """

    def __init__(
        self, files: Sequence[Path], field: str, *, offset: int = 0, step: int = 1
    ) -> None:
        self._files, self._field = files, field
        self._offset, self._step = offset, step
        self._start: dict[str, int] | None = None
        self._file = self._row = self._total = 0

    @property
    def num_shards(self) -> int:
        """Number of files."""
        return len(self._files)

    def shard(self, num_shards: int, index: int, *, contiguous: bool) -> "FileRows":
        """The rows of every num_shards-th file."""
        assert not contiguous
        return FileRows(self._files[index::num_shards], self._field)

    def every(self, step: int, offset: int) -> "FileRows":
        """Every step-th row of all files."""
        return FileRows(self._files, self._field, offset=offset, step=step)

    def load_state_dict(self, state: dict[str, int] | None) -> None:
        """Sets where the next iteration starts; None: before the first row.

        Raises ValueError for a place as `datasets` names it, which read these files before.
        """
        if state is not None and state.keys() != self.state_dict().keys():
            raise ValueError(
                "the checkpoint's place in the data was saved by an older version of titan_lite; "
                "checkpoint.initial_load_path = its folder starts a new run with its weights"
            )
        self._start = state

    def state_dict(self) -> dict[str, int]:
        """The place after the last row: its file, rows of this file and of all before it."""
        return {"file": self._file, "row": self._row, "total": self._total}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Raises UnreadableError naming the file."""
        start = self._start or {"file": 0, "row": 0, "total": 0}
        self._file, self._row, self._total = start["file"], start["row"], start["total"]
        while self._file < len(self._files):
            file = self._files[self._file]
            rows = rows_of(file, self._field, first=self._row)
            while (row := _next(rows, file)) is not None:
                is_kept = self._total % self._step == self._offset
                self._row, self._total = self._row + 1, self._total + 1
                if is_kept:
                    yield row
            self._file, self._row = self._file + 1, 0


def rows_of(file: Path, field: str, *, first: int = 0) -> Iterator[dict[str, Any]]:
    """The rows of a file from number `first` on; of Parquet and Arrow, the field's values."""
    match format_of(file):
        case "parquet":
            return _parquet(file, field, first)
        case "arrow":
            return _arrow(file, field, first)
        case "text":
            texts = _texts(file)
        case _:
            # Empty lines are no documents.
            texts = filter(str.strip, _texts(file))
    return ({"text": text} for text in itertools.islice(texts, first, None))


def place_of(row: dict[str, Any], files: Sequence[Path]) -> str:
    """File and line of an undecoded row, found by reading the files; "" where that is not known."""
    for file in files:
        if format_of(file) in ("json", "text"):
            for number, text in enumerate(_texts(file), start=1):
                if text == row.get("text"):
                    unit = "document" if plain_suffix(file) == ".json" else "line"
                    return str(file) if format_of(file) == "text" else f"{file}, {unit} {number}"
    return ""


def _next(rows: Iterator[dict[str, Any]], file: Path) -> dict[str, Any] | None:
    try:
        return next(rows, None)
    # Parsers and decompressors each raise types of their own.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnreadableError(f"cannot read {file}: {reason:.300}") from error


def _open(file: Path) -> IO[str]:
    """A file without its compression; all newlines become one."""
    match compression_of(file):
        case ".gz":
            return gzip.open(file, "rt", encoding=RAW_ENCODING)
        case ".bz2":
            return bz2.open(file, "rt", encoding=RAW_ENCODING)
        case ".xz":
            return lzma.open(file, "rt", encoding=RAW_ENCODING)
        case ".zst":
            import pyarrow

            stream = pyarrow.input_stream(str(file), compression="zstd")
            return io.TextIOWrapper(cast(IO[bytes], stream), encoding=RAW_ENCODING)
        case _:
            return file.open(encoding=RAW_ENCODING)


def _texts(file: Path) -> Iterator[str]:
    """Undecoded documents, and empty lines."""
    if format_of(file) == "text":
        return _whole(file)
    return _json(file) if plain_suffix(file) == ".json" else _lines(file)


def _whole(file: Path) -> Iterator[str]:
    with _open(file) as opened:
        yield opened.read()


def _lines(file: Path) -> Iterator[str]:
    with _open(file) as opened:
        for line in opened:
            yield line.rstrip("\n")


def _json(file: Path) -> Iterator[str]:
    """The documents of an array, one document on several lines, or lines."""
    with _open(file) as opened:
        head = next((line for line in opened if line.strip()), "")
        is_line = head.removeprefix(_BOM).lstrip()[:1] == "{" and _parsed(head) is not None
        content = None if is_line else _parsed(head + opened.read())
    if content is None:
        yield from _lines(file)
    else:
        yield from map(json.dumps, content if isinstance(content, list) else [content])


def _parsed(text: str) -> Any:
    """JSON; None where it is none."""
    try:
        return json.loads(text.encode(RAW_ENCODING).decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None


def _parquet(file: Path, field: str, first: int) -> Iterator[dict[str, Any]]:
    from pyarrow import parquet

    with parquet.ParquetFile(file) as opened:
        names = opened.schema_arrow.names
        for group in range(opened.num_row_groups):
            num_rows = opened.metadata.row_group(group).num_rows
            if first >= num_rows:
                first -= num_rows
                continue
            rows = (
                row
                for batch in opened.iter_batches(
                    _BATCH_ROWS,
                    row_groups=[group],
                    columns=[field] if field in names else [],
                    use_threads=False,
                )
                for row in _values(batch, names, field)
            )
            yield from itertools.islice(rows, first, None)
            first = 0


def _arrow(file: Path, field: str, first: int) -> Iterator[dict[str, Any]]:
    """Yields the rows of both forms of Arrow's files."""
    import pyarrow
    from pyarrow import ipc

    with pyarrow.memory_map(str(file)) as opened:
        if opened.read(6) == b"ARROW1":
            reader = ipc.open_file(opened)
            batches = map(reader.get_batch, range(reader.num_record_batches))
        else:
            opened.seek(0)
            batches = iter(ipc.open_stream(opened))
        for batch in batches:
            if first >= batch.num_rows:
                first -= batch.num_rows
                continue
            yield from itertools.islice(_values(batch, batch.schema.names, field), first, None)
            first = 0


def _values(batch: Any, names: Sequence[str], field: str) -> Iterator[dict[str, Any]]:
    """The field of each row; where there is none of its name, the others without their values."""
    if field not in names:
        yield from (dict.fromkeys(names) for _ in range(batch.num_rows))
        return
    column = batch.column(batch.schema.names.index(field))
    # A damaged one crashes the process that looks at it.
    column.validate(full=True)
    for start in range(0, batch.num_rows, _BATCH_ROWS):
        for value in column.slice(start, _BATCH_ROWS).to_pylist():
            yield {field: value}
