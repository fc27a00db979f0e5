"""Columns of Arrow, Parquet and Megatron files: texts, or arrays of token ids."""

from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import ipc, parquet, types

from titan_lite.data.megatron import MegatronFile

Rows = Sequence[dict[str, Any]]
_BATCH_ROWS = 1024


class UnreadableError(ValueError):
    """A file that cannot be opened, or is damaged."""

    def __init__(self, file: Path, error: Exception) -> None:
        reason = " ".join(str(error).split()) or type(error).__name__
        super().__init__(f"cannot read {file}: {reason:.300}")


class Column(Rows):
    """The rows of one column; token ids are views of the file, a missing list is None."""

    def __init__(self, array: Any, field: str) -> None:
        """Raises ValueError for lists that are not of integers."""
        # Without this check, reading a damaged array crashes the process.
        array.validate(full=True)
        self._array, self._field = array, field
        self._offsets: Any = None
        if types.is_fixed_size_list(array.type):
            array = self._array = array.cast(pyarrow.list_(array.type.value_type))
        if types.is_list(array.type) or types.is_large_list(array.type):
            if not types.is_integer(array.type.value_type) or array.values.null_count:
                raise ValueError(
                    f"column {field!r} is {array.type}; it must be text, or token ids, which "
                    "must be integers without nulls"
                )
            self._offsets, self._values = array.offsets.to_numpy(), array.values.to_numpy()

    def __len__(self) -> int:
        return len(self._array)

    def __getitem__(self, row: Any) -> Any:
        if self._offsets is None or (self._array.null_count and not self._array[row].is_valid):
            return {self._field: self._array[row].as_py()}
        return {self._field: self._values[self._offsets[row] : self._offsets[row + 1]]}


class _Documents(Rows):
    """The documents of a Megatron file from number `first` on."""

    def __init__(self, file: MegatronFile, field: str, first: int) -> None:
        self._file, self._field, self._first = file, field, first

    def __len__(self) -> int:
        return max(0, len(self._file) - self._first)

    def __getitem__(self, row: Any) -> Any:
        return {self._field: self._file[self._first + row]}


def column_names(file: Path) -> list[str]:
    """Returns the names of the columns of a Parquet or Arrow file."""
    if file.suffix.lower() == ".parquet":
        names: list[str] = parquet.read_schema(file).names
        return names
    with pyarrow.memory_map(str(file)) as opened:
        schema, _ = _batches(opened)
        return list(schema.names)


def parquet_columns(parts: Sequence[Path], field: str, first: int) -> Iterator[Rows]:
    """Yields the rows of a Parquet file from number `first` on."""
    with parquet.ParquetFile(parts[0]) as opened:
        names = opened.schema_arrow.names
        for group in range(opened.num_row_groups):
            num_rows = opened.metadata.row_group(group).num_rows
            if first >= num_rows:
                first -= num_rows
                continue
            columns = [field] if field in names else []
            batches = opened.iter_batches(
                _BATCH_ROWS, row_groups=[group], columns=columns, use_threads=False
            )
            yield from _columns(batches, names, field, first)
            first = 0


def arrow_columns(parts: Sequence[Path], field: str, first: int) -> Iterator[Rows]:
    """Yields the rows of Arrow files, in file or stream format, from number `first` on."""
    for file in parts:
        try:
            with pyarrow.memory_map(str(file)) as opened:
                schema, batches = _batches(opened)
                first = yield from _columns(batches, schema.names, field, first)
        # Arrow raises its own types.
        except Exception as error:
            raise UnreadableError(file, error) from error


def megatron_column(parts: Sequence[Path], field: str, first: int) -> Iterator[Rows]:
    """Yields the documents of a Megatron file from number `first` on."""
    yield _Documents(MegatronFile(parts[0]), field, first)


def _batches(opened: Any) -> tuple[Any, Iterator[Any]]:
    """Returns schema and record batches of an Arrow file, in file or stream format."""
    if opened.read(6) == b"ARROW1":
        reader = ipc.open_file(opened)
        return reader.schema, map(reader.get_batch, range(reader.num_record_batches))
    opened.seek(0)
    stream = ipc.open_stream(opened)
    return stream.schema, iter(stream)


def _columns(
    batches: Iterator[Any], names: Sequence[str], field: str, first: int
) -> Generator[Rows, None, int]:
    """Yields the field of each row from number `first` on; returns the rows left to skip.

    If no field has the name, rows have all field names with None as values.
    """
    for batch in batches:
        if first >= batch.num_rows:
            first -= batch.num_rows
        elif field in names:
            yield Column(batch.column(field).slice(first), field)
            first = 0
        else:
            yield [dict.fromkeys(names)] * (batch.num_rows - first)
            first = 0
    return first
