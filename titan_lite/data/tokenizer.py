"""What every tokenizer does, and which one reads a file."""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt

from titan_lite.data.assets import bundled_asset

Tokens = npt.NDArray[np.uint32]

# Words of other scripts than ASCII's letters are cut nowhere.
_INSIDE_WORD = frozenset(range(0x80, 0x100)) | frozenset(
    b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
)


class Tokenizer(ABC):
    """Text to tokens and back."""

    identity: str
    """Same tokens, same identity: a resumed run compares it."""
    vocab_size: int
    bos_id: int
    """Put before each document; [CLS] of a tokenizer as BERT's."""
    eos_id: int
    """Put after each document; [SEP] of a tokenizer as BERT's."""
    pad_id: int
    """The EOS where a tokenizer has no token for padding."""
    mask_id: int | None
    """None where a tokenizer has no token for what is masked."""
    bytes_per_token: npt.NDArray[np.int64]
    """(vocab_size,) Of the text that each token spells: none for special tokens."""
    starts_word: npt.NDArray[np.bool_]
    """(vocab_size,) Whether a token begins a word instead of continuing the one before it."""

    def encode(self, text: str, *, bos: bool, eos: bool) -> list[int]:
        """Tokens of a text; the spelling of a special token inside it is ordinary text."""
        tokens: list[int] = self._encode(text).tolist()
        return [self.bos_id] * bos + tokens + [self.eos_id] * eos

    def encode_documents(self, texts: Sequence[str], *, threads: int = 1) -> list[Tokens]:
        """Tokens of each text, without BOS and EOS."""
        if threads == 1:
            return [self._encode(text) for text in texts]
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(self._encode, texts))

    @abstractmethod
    def decode(self, tokens: Iterable[int]) -> str:
        """Text of the tokens; bytes that are not UTF-8 become U+FFFD."""

    @abstractmethod
    def _encode(self, text: str) -> Tokens:
        """Tokens of a text, without BOS and EOS."""


def load_tokenizer(path: str | Path = "") -> Tokenizer:
    """The tokenizer of a file, by what the file holds; no path: the bundled one.

    Raises ValueError naming data.tokenizer_path and the file when it is missing or malformed.
    """
    # os.path: leaves a ~user that does not exist, where Path raises.
    given = Path(os.path.expanduser(path))  # noqa: PTH111
    file = given if path else bundled_asset("tokenizer/tokenizer.model")
    if not file.is_file():
        raise ValueError(f"data.tokenizer_path: {file} does not exist")
    from titan_lite.data.tiktoken_tokenizer import TiktokenTokenizer

    return TiktokenTokenizer.load(file)


def begins_word(spelling: bytes) -> bool:
    """Whether a token of this text does: one that begins with a letter or digit continues."""
    return not spelling or spelling[0] not in _INSIDE_WORD
