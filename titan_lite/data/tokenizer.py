"""The interface of all tokenizers."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from titan_lite.data.probes import PROBES
from titan_lite.runtime.log import warn_once

Tokens = npt.NDArray[np.uint32]
Ints = npt.NDArray[np.int64]
SPACE = "\u2581"
"""The mark that replaces a space in tokens."""


class Tokenizer(ABC):
    """Text to tokens and back."""

    vocab_size: int
    bos_id: int
    """The token before each document; [CLS] in BERT's tokenizer."""
    eos_id: int
    """The token after each document; [SEP] in BERT's tokenizer."""
    pad_id: int
    """The padding token; the EOS if the tokenizer has none."""
    mask_id: int | None
    """The mask token; None if the tokenizer has none."""
    spellings: Sequence[bytes]
    """The text of each token, empty for special ones."""
    starts_word: npt.NDArray[np.bool_]
    """(vocab_size,) True for tokens that start a word, False for those that continue one."""
    files: Mapping[str, bytes] = MappingProxyType({})
    """Contents of the tokenizer's files, by their names in a Hugging Face folder."""

    @cached_property
    def fingerprint(self) -> str:
        """BOS, EOS and a hash of the ids of PROBES and of the tokens' texts.

        Tokenizers with the same fingerprint are the same. It depends neither on the file's format
        nor on special tokens other than BOS and EOS.
        """
        ids = [tokens.tolist() for tokens in self.encode_documents(PROBES)]
        digest = hashlib.sha256(json.dumps(ids).encode())
        for number, text in enumerate(self.spellings):
            if text:
                digest.update(b"%d %d %b" % (number, len(text), text))
        return f"BOS {self.bos_id}, EOS {self.eos_id}, ids {digest.hexdigest()[:16]}"

    @cached_property
    def bytes_per_token(self) -> Ints:
        """Bytes of each token's text, (vocab_size,)."""
        return np.array(list(map(len, self.spellings)))

    @cached_property
    def prefix_bytes(self) -> int:
        """Bytes of the space that the tokenizer adds before a document's text."""
        # The extra bytes in the tokens of a letter.
        return max(0, int(self.bytes_per_token[self._encode("a")].sum()) - len("a"))

    @property
    def dtype(self) -> np.dtype[Any]:
        """The smallest unsigned dtype for token ids."""
        return np.dtype("<u2" if self.vocab_size <= 2**16 else "<u4")

    def encode(self, text: str, *, bos: bool, eos: bool) -> list[int]:
        """Returns the tokens of a text, in which spellings of special tokens are ordinary text."""
        tokens: list[int] = self._encode(_encodable(text)).tolist()
        return [self.bos_id] * bos + tokens + [self.eos_id] * eos

    def encode_documents(self, texts: Sequence[str], *, threads: int = 1) -> list[Tokens]:
        """Returns the tokens of each text, without BOS and EOS."""
        encodable = map(_encodable, texts)
        if threads == 1:
            return [self._encode(text) for text in encodable]
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(self._encode, encodable))

    def num_bytes(self, tokens: Ints, before: Ints) -> int:
        """Returns the bytes of the tokens' text. before: the token before each of them."""
        prefixes = self.prefix_bytes * np.count_nonzero(before == self.bos_id)
        return int(self.bytes_per_token[tokens].sum() - prefixes)

    @abstractmethod
    def decode(self, tokens: Iterable[int]) -> str:
        """Returns the text of tokens; bytes that are not UTF-8 become U+FFFD."""

    @abstractmethod
    def _encode(self, text: str) -> Tokens:
        """Returns the tokens of a text, without BOS and EOS; releases Python's lock."""


def warn_of_lost_space(file: Path, tokenizer: Tokenizer) -> None:
    """Logs, once per tokenizer, the kinds of white space and characters that it drops."""
    kinds = {"newlines": "\n", "tabs": "\t", "runs of spaces": "  "}
    lost = [
        name
        for name, space in kinds.items()
        if f"a{space}b"
        not in tokenizer.decode(tokenizer.encode(f"a{space}b", bos=False, eos=False))
    ]
    rare = tokenizer.decode(tokenizer.encode("a\U0001f40ba", bos=False, eos=False))
    if "".join(rare.split()) == "aa":
        lost.append("characters without a token")
    if lost:
        warn_once(
            f"data.tokenizer_path: tokenizer {file} removes {', '.join(lost)}, so the language "
            "model never sees them, and code and paragraphs lose their form. To keep them, train a "
            'sentencepiece model with normalization_rule_name="identity", '
            "remove_extra_whitespaces=False and byte_fallback=True, or use a byte-level tokenizer"
        )


def _encodable(text: str) -> str:
    """Returns the text with U+FFFD for lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def begins_word(spelling: bytes) -> bool:
    """Returns whether a token starts a word: it does not if its first byte is a letter or digit."""
    # Bytes from 0x80 on are parts of letters outside of ASCII.
    first = spelling[:1]
    return not (first.isalnum() or first >= b"\x80")
