"""FORMATS: the formats of local files, by suffix, and what reads the rows of each.

The name under which a file is listed decides its format, never the target of a link.
"""

import bz2
import codecs
import functools
import gzip
import io
import itertools
import json
import lzma
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow

from titan_lite.data.columns import Rows, arrow_columns, megatron_column, parquet_columns
from titan_lite.data.documents import RAW_ENCODING, Kind
from titan_lite.data.members import open_members

_BOM = codecs.BOM_UTF8.decode(RAW_ENCODING)


@dataclass(frozen=True)
class Format:
    """A format of local files; those of text may be compressed."""

    name: str
    kind: Kind
    read: Callable[[Path], Iterable[str]] | None = None
    """Returns the undecoded documents of a file of text, and empty lines."""
    columns: Callable[[Sequence[Path], str, int], Iterator[Rows]] | None = None
    """Returns batches of a file's rows, given its parts, a field, and the first row to read."""
    unit: str = "row"
    """Noun for a row in messages."""

    def texts(self, file: Path) -> Iterator[tuple[int, str]]:
        """Yields the documents of a file of text, each with its number among all lines."""
        assert self.read
        numbered = enumerate(self.read(file), 1)
        # An empty line is not a document, an empty file is one.
        return (each for each in numbered if self.kind == "files" or each[1].strip())

    def rows(self, parts: Sequence[Path], field: str, first: int) -> Iterator[Rows]:
        """Yields batches of a file's rows from number `first` on; of columns, only the field."""
        if self.columns:
            return self.columns(parts, field, first)
        texts = itertools.islice(self.texts(parts[0]), first, None)
        return ([{"text": text}] for _, text in texts)


COMPRESSIONS: dict[str, Callable[[str], Any]] = {
    ".gz": gzip.open,
    ".bz2": functools.partial(open_members, new=bz2.BZ2Decompressor),
    ".xz": functools.partial(open_members, new=lzma.LZMADecompressor),
    ".zst": functools.partial(pyarrow.input_stream, compression="zstd"),
}
"""Suffix of a compressed file of text -> what opens it."""


def _open(file: Path) -> io.TextIOWrapper:
    """Opens a file of text; all kinds of newlines become "\\n"."""
    opener = COMPRESSIONS.get(compression_of(file), functools.partial(open, mode="rb"))
    return io.TextIOWrapper(opener(str(file)), RAW_ENCODING)


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


def _whole(file: Path) -> Iterator[str]:
    with _open(file) as opened:
        yield opened.read()


FORMATS = {
    ".jsonl": Format("json", "lines", read=_lines, unit="line"),
    ".ndjson": Format("json", "lines", read=_lines, unit="line"),
    ".json": Format("json", "lines", read=_json, unit="document"),
    ".txt": Format("text", "files", read=_whole),
    ".parquet": Format("parquet", "rows", columns=parquet_columns),
    ".arrow": Format("arrow", "rows", columns=arrow_columns),
    ".idx": Format("megatron", "rows", columns=megatron_column),
}
KNOWN = f"{', '.join(FORMATS)} (JSON and text also with {', '.join(COMPRESSIONS)})"


def compression_of(file: Path) -> str:
    """Returns one of COMPRESSIONS, or ""."""
    suffix = file.suffix.lower()
    return suffix if suffix in COMPRESSIONS else ""


def plain_suffix(file: Path) -> str:
    """Returns the suffix in lower case, without that of a compression."""
    return (Path(file.stem) if compression_of(file) else file).suffix.lower()


def format_of(file: Path) -> str:
    """Returns the name of a file's format; "" if it is not a supported one."""
    form = FORMATS.get(plain_suffix(file))
    return form.name if form and (form.read or not compression_of(file)) else ""
