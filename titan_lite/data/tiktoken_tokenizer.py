"""Byte-level BPE tokenizers in tiktoken's file format, with the special tokens of Llama 3."""

import base64
import binascii
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import tiktoken

from titan_lite.data.tokenizer import Tokenizer, Tokens, begins_word

# Llama 3's split of a text into parts that BPE merges separately (llama_models.llama3.tokenizer).
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_NAMED_SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    "<|image|>",
)
SPECIAL_TOKENS = _NAMED_SPECIAL_TOKENS + tuple(
    f"<|reserved_special_token_{i}|>" for i in range(2, 256 - len(_NAMED_SPECIAL_TOKENS) + 2)
)
# About a million spaces in a row exhaust the regex engine's stack: such a document is cut.
_CUT_CHARS = 100_000


class TiktokenTokenizer(Tokenizer):
    """The tokens of a file, followed by the 256 special tokens of Llama 3.

    ranks: token to rank, in the order of ranks.
    """

    def __init__(self, ranks: dict[bytes, int]) -> None:
        special_tokens = {token: len(ranks) + i for i, token in enumerate(SPECIAL_TOKENS)}
        self._encoding = tiktoken.Encoding(
            "titan_lite",
            pat_str=SPLIT_PATTERN,
            mergeable_ranks=ranks,
            special_tokens=special_tokens,
        )
        self.ranks = ranks
        self.vocab_size = self._encoding.n_vocab
        self.bos_id = special_tokens["<|begin_of_text|>"]
        self.eos_id = special_tokens["<|end_of_text|>"]
        self.pad_id = special_tokens["<|finetune_right_pad_id|>"]
        self.mask_id = special_tokens["<|reserved_special_token_0|>"]
        self.spellings = [*ranks, *(b"" for _ in SPECIAL_TOKENS)]
        self.starts_word = np.array(list(map(begins_word, self.spellings)))

    def decode(self, tokens: Iterable[int]) -> str:
        return self._encoding.decode(list(tokens))

    def _encode(self, text: str) -> Tokens:
        try:
            return self._encoding.encode_to_numpy(text, disallowed_special=())
        except ValueError:
            if len(text) <= _CUT_CHARS:
                raise
            cuts = range(0, len(text), _CUT_CHARS)
            return np.concatenate([self._encode(text[cut : cut + _CUT_CHARS]) for cut in cuts])


def read_ranks(path: Path, content: bytes) -> dict[bytes, int]:
    """Returns the ranks of "base64-token rank" lines; ValueError naming file and line."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            token, rank = line.split()
            token_bytes = base64.b64decode(token, validate=True)
            well_formed = int(rank) == len(ranks) and token_bytes not in ranks
        except (ValueError, binascii.Error):
            well_formed = False
        if not well_formed:
            got = repr(line[:60].decode("ascii", "replace"))
            if number == 1:
                raise ValueError(
                    f"{path} is not a tokenizer: it is neither JSON nor a sentencepiece model, and "
                    "its first line is not a base64 token and the rank 0, as in tiktoken's format: "
                    f"{got}"
                )
            raise ValueError(
                f"{path}, line {number}: expected a base64 token that no earlier line has, and the "
                f"rank {len(ranks)} (tiktoken's format), got {got}"
            )
        ranks[token_bytes] = len(ranks)
    missing = [value for value in range(256) if bytes([value]) not in ranks]
    if missing:
        raise ValueError(
            f"{path}: {len(missing)} of the 256 single bytes have no rank, the first is "
            f"{missing[0]}: not a byte-level tokenizer"
        )
    return ranks
