"""Tokenizers of sentencepiece: a model file such as Llama 2's tokenizer.model."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from titan_lite.data.special_tokens import read_companions, special_tokens
from titan_lite.data.tokenizer import SPACE, Tokenizer, Tokens, begins_word, warn_of_lost_space

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model; companion files may name other special tokens."""

    def __init__(self, file: Path, content: bytes) -> None:
        """Raises ValueError naming the file if it cannot be used."""
        companions = read_companions(file)
        self._model = _read(file, content)
        self.bos_id, self.eos_id, self.pad_id, self.mask_id = special_tokens(
            file, companions, self._id_of, self._own_ids()
        )
        self.vocab_size = self._model.vocab_size()
        self.spellings = list(map(self._spelling, range(self.vocab_size)))
        self.starts_word = np.array(list(map(begins_word, self.spellings)))
        self.files = {"tokenizer.model": content, **companions}
        warn_of_lost_space(file, self)

    def decode(self, tokens: Iterable[int]) -> str:
        return self._model.decode(list(tokens))

    def _encode(self, text: str) -> Tokens:
        return np.array(self._model.encode(text), np.uint32)

    def _spelling(self, number: int) -> bytes:
        model = self._model
        if model.is_control(number) or model.is_unknown(number) or model.is_unused(number):
            return b""
        piece: str = model.id_to_piece(number)
        if model.is_byte(number):
            return bytes.fromhex(piece[3:5])  # <0x0A>
        return piece.replace(SPACE, " ").encode()

    def _id_of(self, piece: str) -> int | None:
        number: int = self._model.piece_to_id(piece)
        return number if self._model.id_to_piece(number) == piece else None

    def _own_ids(self) -> dict[str, int]:
        """Returns the special tokens that the model itself names (-1: none), by use."""
        model = self._model
        own = {"bos": model.bos_id(), "eos": model.eos_id(), "pad": model.pad_id()}
        return {use: number for use, number in own.items() if number >= 0}


def _read(file: Path, content: bytes) -> "SentencePieceProcessor":
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        raise ValueError(
            f"{file} is a sentencepiece model: pip install sentencepiece to read it"
        ) from None
    try:
        return SentencePieceProcessor(model_proto=content)
    except RuntimeError:
        raise ValueError(f"{file} is a damaged or truncated sentencepiece model") from None
