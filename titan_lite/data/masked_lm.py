"""Documents become the samples of a masked language model, as BERT's: [CLS] A [SEP] B [SEP].

As Devlin et al., arXiv:1810.04805, section 3.1 and appendix A.2, have it, but for one thing: there
A and B are made of sentences. A stream of tokens knows none, so that both are spans of tokens, and
begin where a word does. Under a B that does not follow A its real continuation is not lost: the
next sample's A begins there.

All that is drawn for a sample follows from the run's seed and the sample's number in its stream: it
is the same in every layout and after any resume, and another one in the next epoch.
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

FOLLOWS, OTHER = 0, 1  # labels of a pair, as Hugging Face has them
MASKED, REPLACED = 0.8, 0.1  # of what is predicted; the rest stays as it is
# Tokens after which a word is cut: what a script without spaces writes would be one word, and one
# word at least is hidden.
MAX_WORD = 16
# Not some documents too short for a sample, but a source that has no others.
MAX_EMPTY_BLOCKS = 100


class Pair(NamedTuple):
    """The parts of one sample, without special tokens, and how they belong together."""

    first: Tokens
    second: Tokens | None
    label: int


class Draws:
    """Uniform numbers from a key; numpy keeps the raw bits of a generator in all versions."""

    def __init__(self, *key: int) -> None:
        self._bits = np.random.PCG64(np.random.SeedSequence(key))

    def uniform(self, count: int) -> npt.NDArray[np.float64]:
        """`count` numbers in [0, 1)."""
        numbers: npt.NDArray[np.float64] = (self._bits.random_raw(count) >> np.uint64(11)) / 2.0**53
        return numbers

    def below(self, limit: int) -> int:
        """One of 0 to limit - 1."""
        return int(self.uniform(1)[0] * limit)


def mask_of(tokenizer: Tokenizer) -> int:
    """The token for what is masked; ValueError where a tokenizer has none."""
    if tokenizer.mask_id is None:
        raise SettingError(
            "data.tokenizer_path",
            "this tokenizer has no token for what is masked, which a masked "
            'language model needs: name one in a tokenizer_config.json beside it, {"mask_token": '
            '"..."}',
        )
    return tokenizer.mask_id


class MaskedPairs:
    """Makes rows as [masked_lm] says; a Rows, as packing.Packing is.

    Raises ValueError for a tokenizer without a token for what is masked.
    """

    def __init__(self, section: MaskedLM, seq_len: int, tokenizer: Tokenizer) -> None:
        self._section, self._seq_len, self._tokenizer = section, seq_len, tokenizer
        self._mask_id = mask_of(tokenizer)
        self._text_tokens = np.flatnonzero(tokenizer.bytes_per_token)
        num_parts = 2 if section.next_sentence else 1
        self._least, self._most = num_parts, seq_len - 1 - num_parts

    def settings(self) -> dict[str, Any]:
        """Settings that a resumed run must keep."""
        own = {f"masked_lm.{key}": value for key, value in self._section.model_dump().items()}
        # The fingerprint of a tokenizer leaves it out.
        return {"data.packing": None, "data.packing_block": None, "mask_id": self._mask_id} | own

    def rows(
        self, blocks: Iterable[tuple[Mark, Tokens]], offset: int, *, key: tuple[int, int], item: int
    ) -> Iterator[tuple[MakeRow, Mark, int]]:
        """Rows of samples number `item` on, each with the place after it, as those of `pack`.

        key: the run's seed and the stream. What a document has left that is too short for a sample
        is not given out.
        """
        empty = 0
        for mark, tokens in blocks:
            starts = np.flatnonzero(tokens[:, 1] == 0)
            ends = np.append(starts[1:], len(tokens)) - 1
            # Without BOS and EOS.
            contents = [(a + 1, b) for a, b in zip(starts.tolist(), ends.tolist(), strict=True)]
            contents = [(begin, end) for begin, end in contents if begin < end]
            empty = 0 if any(e - b >= self._least for b, e in contents) else empty + 1
            if empty == MAX_EMPTY_BLOCKS:
                raise ValueError(
                    f"no document in {empty} blocks of them has {self._least} tokens, the least "
                    "that a sample is made of"
                )
            for number, (begin, end) in enumerate(contents):
                offset = max(offset, begin)
                while end - offset >= self._least:
                    draws = Draws(*key, item)
                    pair, offset = self._cut(tokens[:, 0], contents, number, offset, draws)
                    item += 1
                    yield functools.partial(self._row, pair, draws), mark, offset
            offset = 0

    def _cut(
        self,
        tokens: Tokens,
        contents: list[tuple[int, int]],
        number: int,
        begin: int,
        draws: Draws,
    ) -> tuple[Pair, int]:
        """A sample that begins in document `number` of a block, and where in it the next one does.

        contents: where in `tokens` each document lies.
        """
        length = self._most
        if draws.uniform(1)[0] < self._section.short_seq_prob:
            length = self._least + draws.below(self._most - self._least + 1)
        end = min(begin + length, contents[number][1])
        if not self._section.next_sentence:
            return Pair(tokens[begin:end], None, IGNORED), end
        middle = self._word_from(tokens, begin + 1 + draws.below(end - begin - 1), end)
        first, second = tokens[begin:middle], tokens[middle:end]
        if draws.below(2) == FOLLOWS:
            return Pair(first, second, FOLLOWS), end
        if len(contents) == 1:
            # No other document at hand: what does not follow is what comes before.
            return Pair(second, first, OTHER), end
        other = draws.below(len(contents) - 1)
        low, high = contents[other + (other >= number)]
        # As long as what follows, for lengths not to tell which it is.
        start = low + draws.below(max(1, high - low - len(second) + 1))
        start = self._word_from(tokens, start, high)
        return Pair(first, tokens[start : min(high, start + len(second))], OTHER), middle

    def _word_from(self, tokens: Tokens, place: int, end: int) -> int:
        """The first place from this one on, before the end, where a word begins; else this one."""
        starts = np.flatnonzero(self._tokenizer.starts_word[tokens[place:end]])
        return place + int(starts[0]) if len(starts) else place

    def _row(self, pair: Pair, draws: Draws) -> Row:
        """Masked and padded; padding is a document of its own."""
        cls, sep = np.array([[self._tokenizer.bos_id], [self._tokenizer.eos_id]], np.uint32)
        parts = [cls, pair.first, sep]
        second = len(pair.first) + 2
        if pair.second is not None:
            parts += [pair.second, sep]
        tokens = np.concatenate(parts).astype(np.int64)
        is_text = np.ones(len(tokens), np.bool_)
        is_text[[0, second - 1, -1]] = False
        inputs, labels = self._mask(tokens, np.flatnonzero(is_text), draws)
        padding = (0, self._seq_len - len(tokens))
        token_types = np.arange(self._seq_len)
        return Row(
            inputs=np.pad(inputs, padding, constant_values=self._tokenizer.pad_id),
            labels=np.pad(labels, padding, constant_values=IGNORED),
            documents=(token_types >= len(tokens)).astype(np.int64),
            token_types=((token_types >= second) & (token_types < len(tokens))).astype(np.int64),
            pair_labels=np.int64(pair.label),
        )

    def _mask(self, tokens: Ints, places: Ints, draws: Draws) -> tuple[Ints, Ints]:
        """Inputs and labels; places: of the tokens that may be predicted."""
        begins = np.ones(len(places), np.bool_)
        if self._section.whole_word_masking:
            # A part's first word may have begun before it.
            begins = self._tokenizer.starts_word[tokens[places]] | (np.diff(places, prepend=0) > 1)
            numbers = np.arange(len(places))
            of_word = numbers - np.maximum.accumulate(np.where(begins, numbers, 0))
            begins |= of_word % MAX_WORD == 0
        firsts = np.flatnonzero(begins | (np.arange(len(places)) == 0))
        lengths = np.diff(firsts, append=len(places))
        wanted = max(1, round(len(places) * self._section.mask_prob))
        order = np.argsort(draws.uniform(len(lengths)), kind="stable")
        ends = lengths[order].cumsum()
        # Words up to the number of tokens that is nearest to what is wanted, and at least one.
        count = max(1, int((ends - lengths[order] / 2 < wanted).sum()))
        is_chosen = np.zeros(len(lengths), np.bool_)
        is_chosen[order[:count]] = True
        chosen = places[np.repeat(is_chosen, lengths)]

        inputs, labels = tokens.copy(), np.full_like(tokens, IGNORED)
        labels[chosen] = tokens[chosen]
        kind = draws.uniform(len(chosen))
        drawn = (draws.uniform(len(chosen)) * len(self._text_tokens)).astype(np.int64)
        replaced = kind < MASKED + REPLACED
        inputs[chosen[replaced]] = self._text_tokens[drawn[replaced]]
        inputs[chosen[kind < MASKED]] = self._mask_id
        return inputs, labels
