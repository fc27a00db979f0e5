"""Megatron-LM's token files: NAME.bin has the ids of all sequences, NAME.idx their positions.

NAME.idx is little-endian: the magic bytes, version (uint64), dtype code (uint8), the number of
sequences and of document boundaries (uint64), then each sequence's length (int32) and byte offset
in NAME.bin (int64), then the boundaries (int64): document n is the sequences from number
boundary[n] up to boundary[n + 1]. Modes of sequences (int8) may follow and are not read.
"""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

_MAGIC, _VERSION = b"MMIDIDX\x00\x00", 1
_HEADER = struct.Struct("<9sQBQQ")
# The codes of token ids; 6 and 7 are floats.
_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


class MegatronFile:
    """The documents of a pair of files; both are mapped into memory."""

    def __init__(self, index: Path) -> None:
        """Raises ValueError naming the file that is missing, damaged or truncated."""
        self._data = index.with_suffix(".bin")
        if not self._data.is_file():
            raise ValueError(f"{self._data} is missing: {index} is the index of its documents")
        content = np.memmap(index, np.uint8, "r").view(np.ndarray) if index.stat().st_size else b""
        if len(content) < _HEADER.size or bytes(content[:9]) != _MAGIC:
            raise ValueError(f"{index} is damaged: it does not start with Megatron's {_MAGIC!r}")
        _, version, code, sequences, boundaries = _HEADER.unpack(bytes(content[: _HEADER.size]))
        if version != _VERSION:
            raise ValueError(f"{index} has version {version}; {_VERSION} is required")
        if code not in _DTYPES:
            codes = ", ".join(map(str, _DTYPES))
            raise ValueError(f"{index} has dtype code {code}; token ids have one of {codes}")
        needed = _HEADER.size + 12 * sequences + 8 * boundaries
        if len(content) not in (needed, needed + sequences):
            raise ValueError(
                f"{index} has {len(content):,} bytes; {sequences:,} sequences and "
                f"{boundaries:,} document boundaries take {needed:,}"
            )
        assert isinstance(content, np.ndarray)
        lengths, offsets, self._boundaries = (
            np.frombuffer(content, dtype, count, start)
            for dtype, count, start in (
                ("<i4", sequences, _HEADER.size),
                ("<i8", sequences, _HEADER.size + 4 * sequences),
                ("<i8", boundaries, _HEADER.size + 12 * sequences),
            )
        )
        self._dtype = np.dtype(_DTYPES[code])
        self._lengths, self._offsets = lengths, offsets
        end = int(offsets[-1]) + int(lengths[-1]) * self._dtype.itemsize if sequences else 0
        if (size := self._data.stat().st_size) != end:
            raise ValueError(f"{self._data} has {size:,} bytes; its index describes {end:,}")
        if not boundaries or self._boundaries[0] != 0 or self._boundaries[-1] != sequences:
            raise ValueError(f"{index} is damaged: its documents do not cover its sequences")
        self._tokens: npt.NDArray[Any] = np.empty(0, self._dtype)
        if size:
            # A plain array: slices of a memmap take several times as long.
            self._tokens = np.memmap(self._data, self._dtype, "r").view(np.ndarray)

    def __len__(self) -> int:
        """Returns the number of documents."""
        return len(self._boundaries) - 1

    def __getitem__(self, number: int) -> npt.NDArray[Any]:
        """Returns the token ids of a document, a view of the file."""
        first, last = self._boundaries[number : number + 2]
        if first == last:
            return self._tokens[:0]
        lengths, offsets = self._lengths[first:last], self._offsets[first : last + 1]
        start, rest = divmod(int(offsets[0]) if 0 <= first < last else -1, self._dtype.itemsize)
        ends = offsets[:1] + lengths.cumsum(dtype=np.int64) * self._dtype.itemsize
        tokens = self._tokens[start : start + int(lengths.sum())]
        is_whole = len(lengths) == last - first and len(tokens) == lengths.sum()
        # Sequences follow each other without a gap.
        follow = np.array_equal(ends[: len(offsets) - 1], offsets[1:])
        if start < 0 or rest or not is_whole or not follow:
            raise ValueError(f"the positions of document {number + 1} are damaged")
        return tokens
