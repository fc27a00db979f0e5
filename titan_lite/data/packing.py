"""Documents joined into one run of tokens, cut into samples that overlap by one token.

Legend: S = seq_len. A sample is S + 1 tokens: S inputs and, shifted by one, S labels. Its last
token is the first of the next sample, so that every token but the very first is a label once.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np

from titan_lite.data.tokenizer import Tokens

Mark = TypeVar("Mark")


def join_documents(documents: Sequence[Tokens], bos_id: int, eos_id: int) -> Tokens:
    """[BOS] document [EOS] of each document, one after the other."""
    bos, eos = np.array([bos_id], np.uint32), np.array([eos_id], np.uint32)
    pieces = [piece for document in documents for piece in (bos, document, eos)]
    return np.concatenate(pieces) if pieces else np.empty(0, np.uint32)


def pack(
    blocks: Iterable[tuple[Mark, Tokens]], seq_len: int, offset: int = 0
) -> Iterator[tuple[Tokens, Mark, int]]:
    """Samples of S + 1 tokens, each with the place where the next one starts.

    The first sample starts `offset` tokens into the first block. A place is the mark of a block and
    an offset into its tokens: blocks from that mark on, packed from that offset, give the samples
    that follow. What is left at the end and is too short for a sample is not given out.
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
