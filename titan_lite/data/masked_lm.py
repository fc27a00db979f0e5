"""Samples of a masked language model from documents, as in BERT: [CLS] A [SEP] B [SEP].

Follows Devlin et al., arXiv:1810.04805, section 3.1 and appendix A.2, with one difference: A and B
are spans of tokens that start at a word, not sentences. If B is random, the next sample's A starts
at A's real continuation, so no text is lost.

Random numbers depend only on the run's seed and the sample's number in its stream: they are the
same in every layout and after any resume, and differ between epochs.
"""

import functools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from titan_lite.config.problems import SettingError
from titan_lite.config.schema import MaskedLM
from titan_lite.data.packing import IGNORED, Ints, MakeRow, Mark, Row
from titan_lite.data.tokenizer import Tokenizer, Tokens

FOLLOWS, OTHER = 0, 1  # labels of a pair, as in Hugging Face
MASKED, REPLACED = 0.8, 0.1  # fractions of the predicted tokens; the rest stays unchanged
# Longer words are cut: text in a script without spaces would be one word, and at least one word is
# masked.
MAX_WORD = 16
# More blocks in a row without a long enough document end the run.
MAX_EMPTY_BLOCKS = 100


class Pair(NamedTuple):
    """The two parts of a sample, without special tokens, and the label of the pair."""

    first: Tokens
    second: Tokens | None
    label: int


class KeyedRandom:
    """Uniform random numbers from a key; all versions of numpy give the same raw bits."""

    def __init__(self, *key: int) -> None:
        self._bits = np.random.PCG64(np.random.SeedSequence(key))

    def uniform(self, count: int) -> npt.NDArray[np.float64]:
        """Returns `count` numbers in [0, 1)."""
        return (self._bits.random_raw(count) >> np.uint64(11)) / 2.0**53

    def below(self, limit: int) -> int:
        """Returns an integer from 0 to limit - 1."""
        return int(self.uniform(1)[0] * limit)


def require_mask_id(tokenizer: Tokenizer) -> int:
    """Returns the mask token; ValueError if the tokenizer has none."""
    if tokenizer.mask_id is None:
        raise SettingError(
            "data.tokenizer_path",
            "this tokenizer has no mask token, which a masked language model requires: name one in "
            'a tokenizer_config.json next to it, {"mask_token": "..."}',
        )
    return tokenizer.mask_id


class MaskedPairs:
    """Rows made according to [masked_lm]; ValueError for a tokenizer without a mask token."""

    def __init__(self, section: MaskedLM, seq_len: int, tokenizer: Tokenizer) -> None:
        self._section, self._seq_len, self._tokenizer = section, seq_len, tokenizer
        self._mask_id = require_mask_id(tokenizer)
        self._text_tokens = np.flatnonzero(tokenizer.bytes_per_token)
        num_parts = 2 if section.next_sentence else 1
        self._least, self._most = num_parts, seq_len - 1 - num_parts

    def settings(self) -> dict[str, Any]:
        """Settings that a resumed run must keep."""
        own = {f"masked_lm.{key}": value for key, value in self._section.model_dump().items()}
        # The tokenizer's fingerprint does not include mask_id.
        return {"data.packing": None, "data.packing_block": None, "mask_id": self._mask_id} | own

    def rows(
        self, blocks: Iterable[tuple[Mark, Tokens]], offset: int, *, key: tuple[int, int], item: int
    ) -> Iterator[tuple[MakeRow, Mark, int]]:
        """Yields rows from sample number `item` on, each with the place after it (see `pack`).

        key: the run's seed and the stream's number. A remainder of a document that is too short for
        a sample is dropped.
        """
        empty = 0
        for mark, tokens in blocks:
            starts = np.flatnonzero(tokens[:, 1] == 0)
            ends = np.append(starts[1:], len(tokens)) - 1
            # Without BOS and EOS.
            contents = [(a + 1, b) for a, b in zip(starts.tolist(), ends.tolist(), strict=True)]
            contents = [(start, end) for start, end in contents if start < end]
            empty = 0 if any(end - a >= self._least for a, end in contents) else empty + 1
            if empty == MAX_EMPTY_BLOCKS:
                raise ValueError(
                    f"none of the documents in {empty} shuffle buffers in a row has at least "
                    f"{self._least} tokens, the minimum for a sample: use longer documents"
                )
            for number, (start, end) in enumerate(contents):
                offset = max(offset, start)
                while end - offset >= self._least:
                    random = KeyedRandom(*key, item)
                    pair, offset = self._cut(tokens[:, 0], contents, number, offset, random)
                    item += 1
                    yield functools.partial(self._row, pair, random), mark, offset
            offset = 0

    def _cut(
        self,
        tokens: Tokens,
        contents: list[tuple[int, int]],
        number: int,
        start: int,
        random: KeyedRandom,
    ) -> tuple[Pair, int]:
        """Returns the sample at `start` in document `number`, and the start of the next one.

        contents: (start, end) of each document in `tokens`.
        """
        length = self._most
        if random.uniform(1)[0] < self._section.short_seq_prob:
            length = self._least + random.below(self._most - self._least + 1)
        end = min(start + length, contents[number][1])
        if not self._section.next_sentence:
            return Pair(tokens[start:end], None, IGNORED), end
        middle = self._word_from(tokens, start + 1 + random.below(end - start - 1), end)
        first, second = tokens[start:middle], tokens[middle:end]
        if random.below(2) == FOLLOWS:
            return Pair(first, second, FOLLOWS), end
        if len(contents) == 1:
            # Without another document, the two parts are swapped.
            return Pair(second, first, OTHER), end
        other = random.below(len(contents) - 1)
        low, high = contents[other + (other >= number)]
        # As long as the real second part, so that lengths do not give away the label.
        place = low + random.below(max(1, high - low - len(second) + 1))
        place = self._word_from(tokens, place, high)
        return Pair(first, tokens[place : min(high, place + len(second))], OTHER), middle

    def _word_from(self, tokens: Tokens, place: int, end: int) -> int:
        """Returns the first start of a word from `place` up to `end`, or `place` if none."""
        starts = np.flatnonzero(self._tokenizer.starts_word[tokens[place:end]])
        return place + int(starts[0]) if len(starts) else place

    def _row(self, pair: Pair, random: KeyedRandom) -> Row:
        """Returns the masked and padded row; padding has a separate document number."""
        cls, sep = np.array([[self._tokenizer.bos_id], [self._tokenizer.eos_id]], np.uint32)
        parts = [cls, pair.first, sep]
        second = len(pair.first) + 2
        if pair.second is not None:
            parts += [pair.second, sep]
        tokens = np.concatenate(parts).astype(np.int64)
        is_text = np.ones(len(tokens), np.bool_)
        is_text[[0, second - 1, -1]] = False
        inputs, labels = self._mask(tokens, np.flatnonzero(is_text), random)
        padding = (0, self._seq_len - len(tokens))
        token_types = np.arange(self._seq_len)
        return Row(
            inputs=np.pad(inputs, padding, constant_values=self._tokenizer.pad_id),
            labels=np.pad(labels, padding, constant_values=IGNORED),
            documents=(token_types >= len(tokens)).astype(np.int64),
            token_types=((token_types >= second) & (token_types < len(tokens))).astype(np.int64),
            pair_labels=np.int64(pair.label),
            num_tokens=np.int64(len(tokens)),
        )

    def _mask(self, tokens: Ints, places: Ints, random: KeyedRandom) -> tuple[Ints, Ints]:
        """Returns inputs and labels. places: indices of the tokens that may be predicted."""
        starts = np.ones(len(places), np.bool_)
        if self._section.whole_word_masking:
            # The first token of a part counts as a word's start.
            starts = self._tokenizer.starts_word[tokens[places]] | (np.diff(places, prepend=0) > 1)
            numbers = np.arange(len(places))
            of_word = numbers - np.maximum.accumulate(np.where(starts, numbers, 0))
            starts |= of_word % MAX_WORD == 0
        firsts = np.flatnonzero(starts | (np.arange(len(places)) == 0))
        lengths = np.diff(firsts, append=len(places))
        wanted = max(1, round(len(places) * self._section.mask_prob))
        order = np.argsort(random.uniform(len(lengths)), kind="stable")
        ends = lengths[order].cumsum()
        # The number of words, at least one, whose tokens are closest to the wanted number.
        count = max(1, int((ends - lengths[order] / 2 < wanted).sum()))
        is_chosen = np.zeros(len(lengths), np.bool_)
        is_chosen[order[:count]] = True
        chosen = places[np.repeat(is_chosen, lengths)]

        inputs, labels = tokens.copy(), np.full_like(tokens, IGNORED)
        labels[chosen] = tokens[chosen]
        kind = random.uniform(len(chosen))
        drawn = (random.uniform(len(chosen)) * len(self._text_tokens)).astype(np.int64)
        replaced = kind < MASKED + REPLACED
        inputs[chosen[replaced]] = self._text_tokens[drawn[replaced]]
        inputs[chosen[kind < MASKED]] = self._mask_id
        return inputs, labels
