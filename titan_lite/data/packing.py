"""Documents become samples: the rows of a batch, and what of them goes together.

Legend: S = seq_len. A sample is up to S + 1 tokens: S inputs and, shifted by one, S labels. Each
token comes with its index in its document: an array (n, 2) of uint32, so that an index of 0 is
where a document starts.
"""

import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from titan_lite.config.schema import Data
from titan_lite.data.tokenizer import Tokens

Mark = TypeVar("Mark")
Ints = npt.NDArray[np.int64]
IGNORED = -100
"""Label of a token after which nothing is predicted, as loss.IGNORE_INDEX."""


@dataclass(frozen=True)
class Row:
    """One sample as the model gets it; every array is (S,).

    positions and documents (numbers, in order) are None where all of a row goes together. Of a
    masked language model: token_types, 0 or 1 by the part of the pair; pair_labels, a number.
    """

    inputs: Ints
    labels: Ints
    positions: Ints | None = None
    documents: Ints | None = None
    token_types: Ints | None = None
    pair_labels: np.int64 | None = None


MakeRow = Callable[[], Row]


class Rows(Protocol):
    """How the documents of a stream become its rows."""

    def settings(self) -> dict[str, Any]:
        """Settings that a resumed run must keep."""

    def rows(
        self, blocks: Iterable[tuple[Mark, Tokens]], offset: int, *, key: tuple[int, int], item: int
    ) -> Iterator[tuple[MakeRow, Mark, int]]:
        """Rows of samples number `item` on, each with the place after it, as those of `pack`.

        key: the run's seed, and the stream's number.
        """


class Packing:
    """Rows as data.packing says."""

    def __init__(self, section: Data, seq_len: int) -> None:
        self._section, self._seq_len = section, seq_len

    def settings(self) -> dict[str, Any]:
        """Settings that a resumed run must keep."""
        packing, block = self._section.packing, self._section.packing_block
        return {
            "data.packing": packing,
            "data.packing_block": block if packing == "fixed" else None,
        }

    def rows(
        self, blocks: Iterable[tuple[Mark, Tokens]], offset: int, *, key: tuple[int, int], item: int
    ) -> Iterator[tuple[MakeRow, Mark, int]]:
        """As Rows says; nothing is drawn."""
        cut = cut_documents if self._section.packing == "none" else pack
        for sample, mark, place in cut(blocks, self._seq_len, offset):
            yield functools.partial(to_row, sample, self._seq_len, self._section), mark, place


def join_documents(documents: Sequence[npt.NDArray[Any]], bos_id: int, eos_id: int) -> Tokens:
    """[BOS] document [EOS] of each document, one after the other, with the indices: (n, 2)."""
    joined = [np.empty((0, 2), np.uint32)]
    for document in documents:
        numbered = np.empty((len(document) + 2, 2), np.uint32)
        numbered[0, 0], numbered[1:-1, 0], numbered[-1, 0] = bos_id, document, eos_id
        numbered[:, 1] = np.arange(len(numbered))
        joined.append(numbered)
    return np.concatenate(joined)


def pack(
    blocks: Iterable[tuple[Mark, Tokens]], seq_len: int, offset: int = 0
) -> Iterator[tuple[Tokens, Mark, int]]:
    """Samples of S + 1 tokens, each with the place where the next one starts.

    The last token of a sample is the first of the next one, so that every token but the very first
    is a label once. The first sample starts `offset` tokens into the first block. A place is the
    mark of a block and an offset into its tokens: blocks from that mark on, packed from that
    offset, give the samples that follow. What is left at the end and is too short for a sample is
    not given out.
    """
    window: deque[tuple[Mark, Tokens]] = deque()
    available = -offset
    for mark, tokens in blocks:
        window.append((mark, tokens))
        available += len(tokens)
        while available > seq_len:
            sample = _take(window, offset, seq_len + 1)
            offset += seq_len
            available -= seq_len
            while offset >= len(window[0][1]):
                offset -= len(window.popleft()[1])
            yield sample, window[0][0], offset


def cut_documents(
    blocks: Iterable[tuple[Mark, Tokens]], seq_len: int, offset: int = 0
) -> Iterator[tuple[Tokens, Mark, int]]:
    """Samples of one document each, or of up to S + 1 tokens of a longer one; places as `pack`'s.

    A long document's samples overlap by one token, as those of `pack`; only its last is shorter.
    """
    for mark, tokens in blocks:
        ends = np.append(np.flatnonzero(tokens[:, 1] == 0), len(tokens))
        while offset < len(tokens):
            end = int(ends[np.searchsorted(ends, offset, side="right")])
            sample = tokens[offset : min(end, offset + seq_len + 1)]
            offset = end if offset + len(sample) == end else offset + seq_len
            yield sample, mark, offset
        offset = 0


def to_row(sample: Tokens, seq_len: int, section: Data) -> Row:
    """Inputs and labels of a sample, its positions and documents, by `data.packing`.

    "document": positions count from a document's start, or from the sample's for a document that
    began before it. The token after a document's last is the next one's BOS, whatever that says:
    its label is not counted.
    "fixed": the same for blocks of `packing_block` tokens instead of documents, but for the label
    at a block's end: it is the token that follows there, and counted, as at the end of a sample.
    "none": a shorter sample is padded, with its last token; labels of padding are not counted.
    """
    tokens, indices = sample.astype(np.int64).T
    padding = seq_len + 1 - len(tokens)
    inputs, labels = tokens[:-1], tokens[1:].copy()
    # np.pad takes longer than all else here together.
    if padding:
        inputs = np.pad(tokens, (0, padding - 1), mode="edge")
        labels = np.pad(labels, (0, padding), constant_values=IGNORED)
    place = np.arange(seq_len)
    if section.packing == "document":
        labels[indices[1:] == 0] = IGNORED
        starts = indices[:-1] == 0
        first = np.maximum.accumulate(np.where(starts, place, 0))
        return Row(inputs, labels, place - first, np.cumsum(starts))
    if section.packing == "fixed":
        numbers, positions = np.divmod(place, section.packing_block)
        return Row(inputs, labels, positions, numbers)
    return Row(inputs, labels)


def _take(window: Iterable[tuple[Mark, Tokens]], offset: int, count: int) -> Tokens:
    pieces = []
    for _, tokens in window:
        piece = tokens[offset : offset + count]
        pieces.append(piece)
        count -= len(piece)
        offset = max(0, offset - len(tokens))
        if not count:
            break
    return np.concatenate(pieces)
