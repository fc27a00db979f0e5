"""Tokenized documents on disk: a folder of memory-mapped shards and a manifest.

Shard n is two files without header, little-endian: n.tokens, the tokens of its documents one after
the other, without BOS and EOS, as uint16 or uint32; and n.rows, a ROW for each document of the
source in its order, that ends where the document does. manifest.json is written last.
"""

import dataclasses
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from titan_lite.config.problems import SettingError
from titan_lite.data.tokenizer import Tokenizer
from titan_lite.runtime.stored_files import StoredFile, check_size, write_text

MANIFEST_FILE = "manifest.json"
FORMAT = "titan_lite tokens 3"
# end: tokens of the shard up to the document's last. use: one of the two below.
ROW = np.dtype([("end", "<u8"), ("use", "u1")])
GOOD, BAD = 0, 1
"""A document; one left out as data.on_bad_document = "skip" says."""
UNFINISHED = ".incomplete"

Rows = npt.NDArray[np.void]


@dataclass(frozen=True)
class Shard:
    """Two files, and how many rows and tokens they hold."""

    rows: int
    tokens: int
    crc32: tuple[str, str]
    """Checksums of the tokens and of the rows."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The manifest of a folder of tokens.

    tokenizer: its fingerprint. source: the documents' identity as text, by which they are known
    again. rows_per_file: of the source's files, in order. bytes: UTF-8 text of all documents.
    skipped: bad documents.
    """

    tokenizer: str
    tokenizer_path: str
    source: str
    source_name: str
    text_field: str
    dtype: str
    documents: int
    tokens: int
    bytes: int
    skipped: int
    rows_per_file: list[int]
    shards: list[Shard]
    versions: dict[str, str]

    def files(self) -> dict[str, StoredFile]:
        """Files of all shards, by their names."""
        width = np.dtype(self.dtype).itemsize
        return {
            name: StoredFile(size, crc32)
            for number, shard in enumerate(self.shards)
            for name, size, crc32 in zip(
                shard_files(number),
                (shard.tokens * width, shard.rows * ROW.itemsize),
                shard.crc32,
                strict=True,
            )
        }

    def write(self, folder: Path) -> None:
        """Into the folder's manifest.json."""
        content = {"format": FORMAT, **dataclasses.asdict(self)}
        write_text(folder / MANIFEST_FILE, json.dumps(content, indent=1) + "\n")


def shard_files(number: int) -> tuple[str, str]:
    """Names of the tokens' file and the rows'."""
    return f"{number:05d}.tokens", f"{number:05d}.rows"


def is_token_folder(path: Path) -> bool:
    """Returns whether a folder has such a manifest, or shards: its own files are not documents."""
    if (path / shard_files(0)[0]).exists():
        return True
    if not (path / MANIFEST_FILE).is_file():
        return False
    try:
        return bool(json.loads((path / MANIFEST_FILE).read_bytes())["format"] == FORMAT)
    except (OSError, ValueError, KeyError, TypeError):
        return False


class TokenFolder:
    """A complete folder; its shards are mapped into memory when they are first read."""

    def __init__(self, folder: Path) -> None:
        """Raises ValueError naming the file that is missing, of another size or no manifest."""
        self.folder = folder
        if not (folder / MANIFEST_FILE).exists():
            raise ValueError(f"{folder} has no {MANIFEST_FILE}: no tokenization that was completed")
        try:
            content = json.loads((folder / MANIFEST_FILE).read_bytes())
            form = content.pop("format")
            shards = [Shard(s["rows"], s["tokens"], tuple(s["crc32"])) for s in content["shards"]]
            self.manifest = Manifest(**{**content, "shards": shards})
            files = self.manifest.files()
            self._first_rows = np.cumsum([0, *(shard.rows for shard in shards)])
            if self.first_rows[-1] != self._first_rows[-1]:
                raise ValueError("rows_per_file and shards differ in the number of rows")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder / MANIFEST_FILE} is damaged: {error!r}") from None
        if form != FORMAT:
            raise ValueError(f"{folder} has {form!r} instead of {FORMAT!r}: tokenize it again")
        for name, file in files.items():
            check_size(folder / name, file)
        self._mapped: dict[int, tuple[npt.NDArray[Any], Rows]] = {}

    @cached_property
    def first_rows(self) -> npt.NDArray[np.int64]:
        """First row of each of the source's files, and the number of all rows."""
        return np.cumsum([0, *self.manifest.rows_per_file])

    def use(self, row: int) -> int:
        """GOOD or BAD."""
        number, index = self._place(row)
        return int(self._shard(number)[1]["use"][index])

    def tokens(self, row: int) -> npt.NDArray[Any]:
        """Tokens of a document, without BOS and EOS; a view of the file."""
        number, index = self._place(row)
        tokens, rows = self._shard(number)
        begin = int(rows["end"][index - 1]) if index else 0
        return tokens[begin : int(rows["end"][index])]

    def check(self, tokenizer: Tokenizer, key: str) -> None:
        """ValueError where the tokens are not those of a run's tokenizer."""
        manifest = self.manifest
        if manifest.tokenizer != tokenizer.fingerprint:
            raise SettingError(
                key,
                f"{self.folder} was tokenized with "
                f"{manifest.tokenizer_path or 'the bundled tokenizer'} ({manifest.tokenizer}), "
                f"data.tokenizer_path is another tokenizer ({tokenizer.fingerprint})",
            )

    def _place(self, row: int) -> tuple[int, int]:
        number = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        return number, row - int(self._first_rows[number])

    def _shard(self, number: int) -> tuple[npt.NDArray[Any], Rows]:
        if number not in self._mapped:
            names = shard_files(number)
            dtypes = np.dtype(self.manifest.dtype).newbyteorder("<"), ROW
            tokens, rows = map(_mapped, (self.folder / name for name in names), dtypes)
            self._mapped[number] = tokens, rows
        return self._mapped[number]


class RowsOfStream:
    """Rows of one stream out of several, the same as sources.stream_of gives of the text."""

    def __init__(self, folder: TokenFolder, stream: int, num_streams: int) -> None:
        self._stream, self._num_streams = stream, num_streams
        num_files = len(folder.manifest.rows_per_file)
        self._files: npt.NDArray[np.int64] | None = None
        if num_files >= num_streams:
            # Whole files.
            self._files = np.arange(stream, num_files, num_streams)
            counts = np.diff(folder.first_rows)[self._files]
            self._ends = np.cumsum(counts)
            self._shifts = folder.first_rows[self._files] - (self._ends - counts)
            self.size = int(self._ends[-1])
        else:
            self.size = len(range(stream, int(folder.first_rows[-1]), num_streams))

    def __getitem__(self, index: int) -> int:
        """Number in the folder of the stream's row number `index`."""
        if self._files is None:
            return self._stream + index * self._num_streams
        return index + int(self._shifts[np.searchsorted(self._ends, index, side="right")])


def _mapped(path: Path, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    # An empty file cannot be mapped.
    if path.stat().st_size == 0:
        return np.empty(0, dtype)
    # As a plain array: slices of a memmap cost several times as much.
    return np.memmap(path, dtype, mode="r").view(np.ndarray)
