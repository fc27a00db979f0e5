"""Rows become tokens, in whatever process; imports little, since each process starts with it."""

import logging
import signal
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from titan_lite.data.documents import BadDocument, Kind, document_of
from titan_lite.data.token_files import BAD, GOOD
from titan_lite.data.tokenizer import Tokenizer
from titan_lite.data.tokenizer_files import load_tokenizer
from titan_lite.runtime.parent import end_with_parent


@dataclass(frozen=True)
class Encoded:
    """The tokens of a chunk."""

    uses: npt.NDArray[np.uint8]
    lengths: npt.NDArray[np.int64]
    tokens: npt.NDArray[Any]
    bytes: int
    reasons: dict[int, BadDocument]
    """Why rows cannot be used, by their index."""


class Encoder:
    """Tokenizes chunks, in whatever process."""

    def __init__(self, tokenizer: Tokenizer, kind: Kind, text_field: str) -> None:
        self._tokenizer, self.kind, self._field = tokenizer, kind, text_field

    def __call__(self, rows: list[dict[str, Any]]) -> Encoded:
        uses = np.full(len(rows), GOOD, np.uint8)
        texts, reasons = [], {}
        for index, row in enumerate(rows):
            try:
                texts.append(str(document_of(row, self.kind, self._field, "")))
            except BadDocument as error:
                uses[index], reasons[index] = BAD, error
        documents = self._tokenizer.encode_documents(texts)
        lengths = np.zeros(len(rows), np.int64)
        lengths[uses == GOOD] = [len(document) for document in documents]
        tokens = np.concatenate([np.empty(0, np.uint32), *documents])
        num_bytes = sum(len(text.encode(errors="replace")) for text in texts)
        return Encoded(uses, lengths, tokens.astype(self._tokenizer.dtype), num_bytes, reasons)


_worker: Encoder


def start_worker(tokenizer_path: str, kind: Kind, text_field: str) -> None:
    """Makes a process of the pool ready."""
    global _worker
    # The parent answers Ctrl-C. A worker whose parent was killed would wait for it forever.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
    # The parent has warned of the tokenizer.
    logging.getLogger("titan_lite").setLevel(logging.ERROR)
    _worker = Encoder(load_tokenizer(tokenizer_path), kind, text_field)


def encode_in_worker(rows: list[dict[str, Any]]) -> Encoded:
    """Encodes rows in a process of the pool."""
    return _worker(rows)
