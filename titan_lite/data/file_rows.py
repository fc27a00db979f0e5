"""Rows of local files, from any position: undecoded lines and texts, or a column's values."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titan_lite.data.columns import UnreadableError
from titan_lite.data.formats import FORMATS, plain_suffix


@dataclass(frozen=True)
class LocalFiles:
    """Opens local files, each a sequence of its parts; only Arrow files have several."""

    files: Sequence[Sequence[Path]]
    field: str
    """The column to read."""

    @property
    def num_files(self) -> int:
        """Number of files."""
        return len(self.files)

    def open(self, stream: int, num_streams: int) -> "FileRows":
        """Opens one of the streams."""
        return FileRows(self.files, self.field, stream, num_streams)


class FileRows:
    """The rows of one stream: of whole files, or every num_streams-th row of all files."""

    def __init__(
        self, files: Sequence[Sequence[Path]], field: str, stream: int, num_streams: int
    ) -> None:
        reads_whole_files = len(files) >= num_streams
        self._files = files[stream::num_streams] if reads_whole_files else files
        self._offset, self._step = (0, 1) if reads_whole_files else (stream, num_streams)
        self._field = field
        self._sizes = {part: part.stat().st_size for parts in self._files for part in parts}
        self._file = self._row = self._total = 0

    def load_state_dict(self, state: dict[str, int] | None) -> None:
        """Sets the position; None: before the first row.

        Raises ValueError for a position of an older version, which read these files by `datasets`.
        """
        state = {"file": 0, "row": 0, "total": 0} if state is None else state
        if state.keys() != self.state_dict().keys():
            raise ValueError(
                "the checkpoint's position in the data was saved by an older version of "
                "titan_lite; to start a new run with its weights, choose another job.dump_folder "
                "and set checkpoint.initial_load_path to the checkpoint's folder"
            )
        self._file, self._row, self._total = state["file"], state["row"], state["total"]

    def state_dict(self) -> dict[str, int]:
        """Returns the position after the last row: file, rows read of this file and of all."""
        return {"file": self._file, "row": self._row, "total": self._total}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yields the rows after the position; raises UnreadableError naming the file."""
        while self._file < len(self._files):
            parts = self._files[self._file]
            try:
                self._check(parts)
                yield from self._rows(parts)
                self._check(parts)
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
        form = FORMATS[plain_suffix(file)]
        match form.kind:
            case "files":
                return str(file)
            case "lines":
                number, _ = next(itertools.islice(form.texts(file), self._row - 1, None))
                return f"{file}, {form.unit} {number}"
            case "rows":
                others = f" and {len(parts) - 1} more" if len(parts) > 1 else ""
                return f"{file}{others}, {form.unit} {self._row}"

    def _check(self, parts: Sequence[Path]) -> None:
        """Raises ValueError for a file that has another size than when it was opened."""
        for part in parts:
            size, before = part.stat().st_size, self._sizes[part]
            if size != before:
                raise ValueError(
                    f"its size changed from {before:,} to {size:,} bytes during the run"
                )

    def _rows(self, parts: Sequence[Path]) -> Iterator[dict[str, Any]]:
        """Yields the rows of a file after the position."""
        for rows in FORMATS[plain_suffix(parts[0])].rows(parts, self._field, self._row):
            row, total = self._row, self._total
            for index in range((self._offset - total) % self._step, len(rows), self._step):
                self._row, self._total = row + index + 1, total + index + 1
                yield rows[index]
            self._row, self._total = row + len(rows), total + len(rows)
