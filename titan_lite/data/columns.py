"""Columns of Arrow, Parquet and Megatron files: texts, or arrays of token ids."""

from collections.abc import Callable, Generator, Iterator, Sequence
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


class _LazyRows(Rows):
    """Rows that are made when they are read."""

    def __init__(self, num_rows: int, get: Callable[[int], dict[str, Any]]) -> None:
        self._num_rows, self._get = num_rows, get

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, row: Any) -> Any:
        return self._get(row)


def column_names(file: Path) -> list[str]:
    """Returns the names of the columns of a Parquet or Arrow file."""
    if file.suffix.lower() == ".parquet":
        return parquet.read_schema(file).names
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
    file = MegatronFile(parts[0])
    yield _LazyRows(max(0, len(file) - first), lambda row: {field: file[first + row]})


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
            yield _column(batch.column(field).slice(first), field)
            first = 0
        else:
            yield [dict.fromkeys(names)] * (batch.num_rows - first)
            first = 0
    return first


def _column(array: Any, field: str) -> Rows:
    """Returns the rows of a column; token ids are views of the file, a missing list is None.

    Raises ValueError for lists that are not of integers.
    """
    # Without this check, reading a damaged array crashes the process.
    array.validate(full=True)
    if types.is_fixed_size_list(array.type):
        array = array.cast(pyarrow.list_(array.type.value_type))
    if not (types.is_list(array.type) or types.is_large_list(array.type)):
        return _LazyRows(len(array), lambda row: {field: array[row].as_py()})
    if not types.is_integer(array.type.value_type) or array.values.null_count:
        raise ValueError(
            f"column {field!r} is {array.type}; it must be text, or token ids, which must be "
            "integers without nulls"
        )
    offsets, values = array.offsets.to_numpy(), array.values.to_numpy()

    def ids(row: int) -> dict[str, Any]:
        is_missing = array.null_count and not array[row].is_valid
        return {field: None if is_missing else values[offsets[row] : offsets[row + 1]]}

    return _LazyRows(len(array), ids)
