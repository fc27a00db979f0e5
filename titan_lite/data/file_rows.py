"""Rows of local files, from any position: undecoded lines and texts, or a column's values."""

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

from titan_lite.data.columns import (
    UnreadableError,
    arrow_columns,
    megatron_column,
    parquet_columns,
)
from titan_lite.data.documents import RAW_ENCODING
from titan_lite.data.files import compression_of, format_of, plain_suffix

_BOM = codecs.BOM_UTF8.decode(RAW_ENCODING)


class FileRows:
    """The rows of one stream: of whole files, or every num_streams-th row of all files.

    files: each a sequence of its parts; only Arrow files have several.
    """

    def __init__(
        self,
        files: Sequence[Sequence[Path]],
        field: str,
        stream: int = 0,
        num_streams: int = 1,
    ) -> None:
        reads_whole_files = len(files) >= num_streams
        self._files = files[stream::num_streams] if reads_whole_files else files
        self._offset, self._step = (0, 1) if reads_whole_files else (stream, num_streams)
        self._field = field
        self._start: dict[str, int] | None = None
        self._file = self._row = self._total = 0

    def load_state_dict(self, state: dict[str, int] | None) -> None:
        """Sets the position where the next iteration starts; None: before the first row.

        Raises ValueError for a position of an older version, which read these files by `datasets`.
        """
        if state is not None and state.keys() != self.state_dict().keys():
            raise ValueError(
                "the checkpoint's position in the data was saved by an older version of "
                "titan_lite; to start a new run with its weights, set "
                "checkpoint.initial_load_path = its folder"
            )
        self._start = state

    def state_dict(self) -> dict[str, int]:
        """Returns the position after the last row: file, rows read of this file and of all."""
        return {"file": self._file, "row": self._row, "total": self._total}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yields rows; raises UnreadableError naming the file."""
        start = self._start or {"file": 0, "row": 0, "total": 0}
        self._file, self._row, self._total = start["file"], start["row"], start["total"]
        while self._file < len(self._files):
            parts = self._files[self._file]
            try:
                yield from self._rows(parts)
            except UnreadableError:
                raise
            # Parsers and decompressors each raise other types.
            except Exception as error:
                raise UnreadableError(parts[0], error) from error
            self._file, self._row = self._file + 1, 0

    def place(self) -> str:
        """Returns file and line, or file and row, of the last row that was read."""
        parts = self._files[self._file]
        file = parts[0]
        match format_of(file):
            case "text":
                return str(file)
            case "json":
                unit = "document" if plain_suffix(file) == ".json" else "line"
                lines = (number for number, text in enumerate(_texts(file), 1) if text.strip())
                return f"{file}, {unit} {next(itertools.islice(lines, self._row - 1, None))}"
            case _:
                others = f" and {len(parts) - 1} more" if len(parts) > 1 else ""
                return f"{file}{others}, row {self._row}"

    def _rows(self, parts: Sequence[Path]) -> Iterator[dict[str, Any]]:
        """Yields the rows of a file after the position."""
        for rows in _batches(parts, self._field, self._row):
            row, total = self._row, self._total
            for index in range((self._offset - total) % self._step, len(rows), self._step):
                self._row, self._total = row + index + 1, total + index + 1
                yield rows[index]
            self._row, self._total = row + len(rows), total + len(rows)


def _batches(parts: Sequence[Path], field: str, first: int) -> Iterator[Sequence[dict[str, Any]]]:
    """Yields batches of a file's rows from number `first` on; of columns, only the field."""
    file = parts[0]
    match format_of(file):
        case "parquet":
            return parquet_columns(file, field, first)
        case "arrow":
            return arrow_columns(parts, field, first)
        case "megatron":
            return megatron_column(file, field, first)
        case "text":
            texts = _texts(file)
        case _:
            # An empty line is not a document.
            texts = filter(str.strip, _texts(file))
    return ([{"text": text}] for text in itertools.islice(texts, first, None))


def _open(file: Path) -> IO[str]:
    """Opens a file, decompressed; all kinds of newlines become "\\n"."""
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
    """Returns undecoded documents, and empty lines."""
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
    """Yields the documents of an array, one document on several lines, or a document per line."""
    with _open(file) as opened:
        head = next((line for line in opened if line.strip()), "")
        is_line = head.removeprefix(_BOM).lstrip()[:1] == "{" and _parsed(head) is not None
        content = None if is_line else _parsed(head + opened.read())
    if content is None:
        yield from _lines(file)
    else:
        yield from map(json.dumps, content if isinstance(content, list) else [content])


def _parsed(text: str) -> Any:
    """Returns parsed JSON; None if it is invalid."""
    try:
        return json.loads(text.encode(RAW_ENCODING).decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None
