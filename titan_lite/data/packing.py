"""Packs documents into samples: the rows of a batch, and which tokens may attend to each other.

Legend: S = seq_len. A sample is up to S + 1 tokens: S inputs and, shifted by one, S labels. Tokens
are arrays (n, 2) of uint32: the token's id, and its index in its document, 0 at a document's start.
"""

import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from titan_lite.config.schema import Data
from titan_lite.data.tokenizer import Ints, Tokens

Mark = TypeVar("Mark")
IGNORED = -100
"""Label that is not counted in the loss; the default of torch.nn.functional.cross_entropy."""


@dataclass(frozen=True)
class Row:
    """One sample as the model gets it; every array is (S,).

    positions and documents (ascending numbers) are None if the whole row is one document. A masked
    language model has token_types, 0 or 1 by the part of the pair, and two numbers: pair_labels and
    num_tokens, without padding.
    """

    inputs: Ints
    labels: Ints
    positions: Ints | None = None
    documents: Ints | None = None
    token_types: Ints | None = None
    pair_labels: np.int64 | None = None
    num_tokens: np.int64 | None = None


MakeRow = Callable[[], Row]


class RowMaker(Protocol):
    """A maker of rows from the documents of a stream."""

    def settings(self) -> dict[str, Any]:
        """Settings that a resumed run must keep."""

    def rows(
        self, blocks: Iterable[tuple[Mark, Tokens]], offset: int, *, key: tuple[int, int], item: int
    ) -> Iterator[tuple[MakeRow, Mark, int]]:
        """Yields rows from sample number `item` on, each with the place after it (see `pack`).

        key: the run's seed, and the stream's number.
        """


class Packing:
    """Rows packed according to data.packing."""

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
        """Yields rows (see RowMaker); `key` and `item` are unused: packing is not random."""
        cut = cut_documents if self._section.packing == "none" else pack
        for sample, mark, place in cut(blocks, self._seq_len, offset):
            yield functools.partial(to_row, sample, self._seq_len, self._section), mark, place


def join_documents(documents: Sequence[npt.NDArray[Any]], bos_id: int, eos_id: int) -> Tokens:
    """Concatenates [BOS] document [EOS] of each document, with indices: (n, 2)."""
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
    """Yields samples of S + 1 tokens, each with the place where the next one starts.

    The last token of a sample is the first of the next one, so that every token except the very
    first is a label once. The first sample starts `offset` tokens into the first block. A place is
    the mark of a block and an offset into its tokens: packing from there gives the samples that
    follow. A remainder at the end that is too short for a sample is dropped.
    """
    # Blocks from the next sample's start on, and their tokens from there on.
    window: deque[tuple[Mark, int]] = deque()
    rest = np.empty(0, np.uint32)
    for mark, tokens in blocks:
        rest = np.concatenate([rest, tokens]) if window else tokens[offset:]
        window.append((mark, len(tokens)))
        while len(rest) > seq_len:
            sample, rest = rest[: seq_len + 1], rest[seq_len:]
            offset += seq_len
            while offset >= window[0][1]:
                offset -= window.popleft()[1]
            yield sample, window[0][0], offset


def cut_documents(
    blocks: Iterable[tuple[Mark, Tokens]], seq_len: int, offset: int = 0
) -> Iterator[tuple[Tokens, Mark, int]]:
    """Yields samples of one document, or of a part of a longer one, with places as in `pack`.

    A sample has up to S + 1 tokens. Samples of one document overlap by one token, as in `pack`;
    only the last is shorter.
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
    """Returns inputs, labels, positions and documents of a sample, according to `data.packing`.

    "document": positions count from a document's start, or from the sample's start if the document
    started earlier. The label at a document's end, the BOS of the next one, is not counted.
    "fixed": positions and documents are of blocks of `packing_block` tokens. The label at a block's
    end is the next token, and is counted.
    "none": a shorter sample is padded with its last token; labels of padding are not counted.
    """
    tokens, indices = sample.astype(np.int64).T
    padding = seq_len + 1 - len(tokens)
    inputs, labels = tokens[:-1], tokens[1:].copy()
    # np.pad is slow, so it is called only if needed.
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
