"""Hugging Face's tokenizers: a tokenizer.json, read by the library `tokenizers`."""

import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer as Backend
from tokenizers.models import WordPiece

from titan_lite.data.special_tokens import read_companions, special_tokens
from titan_lite.data.tokenizer import SPACE, Tokenizer, Tokens, begins_word, warn_of_lost_space

# data.tokenizer_threads sets the threads; the library's own threads log a warning at each fork.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
# A text that any tokenizer can encode, and one that few have tokens for.
_PROBES = ("a", "\U0010fffd")


class HFTokenizer(Tokenizer):
    """A tokenizer.json with the special tokens that its companion files name.

    Special tokens inside a text are ordinary text. The data code adds BOS and EOS, not the file's
    template; padding and truncation are off.
    """

    def __init__(self, file: Path, content: bytes) -> None:
        """Raises ValueError naming the file if it cannot be used."""
        companions = read_companions(file)
        self._backend = _read(file, content)
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True
        self.bos_id, self.eos_id, self.pad_id, self.mask_id = special_tokens(
            file, companions, self._backend.token_to_id
        )
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        document = json.loads(content)
        spellings = [b""] * self.vocab_size
        self.starts_word = np.ones(self.vocab_size, bool)
        spell = _Spelling(document)
        for token, number in vocabulary.items():
            spellings[number] = spell.text(token)
            self.starts_word[number] = spell.begins_word(token)
        self._is_special = np.zeros(self.vocab_size, bool)
        special_texts = []
        for number, added in self._backend.get_added_tokens_decoder().items():
            spellings[number] = b"" if added.special else added.content.encode()
            self.starts_word[number] = added.special or begins_word(spellings[number])
            self._is_special[number] = added.special
            special_texts += [re.escape(added.content)] * added.special
        if (unknown := _unknown(document["model"])) in vocabulary:
            spellings[vocabulary[unknown]] = b""
            self._is_special[vocabulary[unknown]] = False
        self._special_text = re.compile("|".join(special_texts))
        self.spellings = spellings
        self.files = {"tokenizer.json": content, **companions}
        # Word pieces drop white space by design.
        if not isinstance(self._backend.model, WordPiece):
            warn_of_lost_space(file, self)

    def decode(self, tokens: Iterable[int]) -> str:
        return self._backend.decode(list(tokens), skip_special_tokens=False)

    def _encode(self, text: str) -> Tokens:
        tokens = self._tokens([text])
        if not self._is_special[tokens].any():
            return tokens
        # Unigram models match special tokens as pieces, unless the text is cut inside of them.
        cuts = [match.start() + 1 for match in self._special_text.finditer(text)]
        parts = [text[i:j] for i, j in itertools.pairwise([0, *cuts, len(text)])]
        return self._tokens(parts)

    def _tokens(self, texts: list[str]) -> Tokens:
        """Returns the concatenated tokens of texts."""
        # A batch, since encode() holds Python's lock; the fast version, without unused offsets.
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return np.concatenate([np.array(encoding.ids, np.uint32) for encoding in encodings])


class _Spelling:
    """Converts tokens of the vocabulary to the text they stand for, by the kind of tokenizer."""

    def __init__(self, document: dict[str, Any]) -> None:
        components = [
            component
            for key in ("normalizer", "pre_tokenizer", "decoder")
            for component in _components(document.get(key))
        ]
        self._byte_level = any(component["type"] == "ByteLevel" for component in components)
        # Metaspace, Replace and Prepend mark spaces.
        self._space_marked = any(SPACE in component.values() for component in components)
        model = document["model"]
        self._has_bytes = model.get("byte_fallback", False)
        self._continuing = model.get("continuing_subword_prefix") or ""
        self._ending = model.get("end_of_word_suffix") or ""

    def text(self, token: str) -> bytes:
        if self._byte_level:
            return bytes(_BYTE_OF[letter] for letter in token if letter in _BYTE_OF)
        if self._has_bytes and (byte := _BYTE.fullmatch(token)):
            return bytes.fromhex(byte[1])
        token = token.removeprefix(self._continuing).removesuffix(self._ending)
        return (token.replace(SPACE, " ") if self._space_marked else token).encode()

    def begins_word(self, token: str) -> bool:
        if self._continuing:
            return not token.startswith(self._continuing)
        return begins_word(self.text(token))


def _read(file: Path, content: bytes) -> Backend:
    """Returns the library's tokenizer, after a test of two texts."""
    try:
        backend = Backend.from_str(content.decode())
        for text in _PROBES:
            backend.encode(text, add_special_tokens=False)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8: {error.reason}") from None
    # The library raises plain Exceptions.
    except Exception as error:
        raise ValueError(f"{file} is not a tokenizer.json of Hugging Face: {error}") from None
    if not backend.get_vocab_size():
        raise ValueError(f"{file} has no tokens")
    return backend


def _components(part: Any) -> Iterator[dict[str, Any]]:
    """Yields a part of a tokenizer.json and, of a sequence, its parts."""
    if isinstance(part, dict):
        if "type" in part:
            yield part
        for value in part.values():
            yield from _components(value)
    elif isinstance(part, list):
        for value in part:
            yield from _components(value)


def _unknown(model: dict[str, Any]) -> str | None:
    """Returns the token for unknown text, if there is one."""
    if model.get("unk_id") is not None:
        return model["vocab"][model["unk_id"]][0]
    return model.get("unk_token")


def _byte_letters() -> list[str]:
    """Returns GPT-2's letter for each byte: itself if printable, else a letter above 255."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(b if b in printable else 256 + others.index(b)) for b in range(256)]


BYTE_LETTERS = _byte_letters()
_BYTE_OF = {letter: byte for byte, letter in enumerate(BYTE_LETTERS)}
