"""A stream: one virtual shard of the documents as an endless run of samples, with its position."""

import difflib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from titan_lite.config.schema import Data
from titan_lite.data.packing import Row, cut_documents, join_documents, pack, to_row
from titan_lite.data.sources import Source, reading, stream_of
from titan_lite.data.tokenizer import Tokenizer, Tokens

if TYPE_CHECKING:
    from datasets import IterableDataset


@dataclass(frozen=True)
class Block:
    """Where a block of documents that are shuffled together begins."""

    epoch: int = 0
    index: int = 0
    """Number of the block in its epoch."""
    cursor: dict[str, Any] | None = None
    """State of the Hugging Face iterable before the block; None: the start of the epoch."""


@dataclass(frozen=True)
class Position:
    """Where the next sample of a stream begins."""

    item: int = 0
    """Samples of the stream before it."""
    block: Block = Block()
    offset: int = 0
    """Tokens of the block before it."""

    def state(self) -> dict[str, Any]:
        """As values that JSON holds."""
        return {"item": self.item, "offset": self.offset, **vars(self.block)}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Position":
        """The inverse of state()."""
        block = Block(state["epoch"], state["index"], state["cursor"])
        return cls(state["item"], block, state["offset"])


class Stream:
    """Samples of one stream, from a position on; an exhausted stream starts its next epoch."""

    def __init__(
        self,
        dataset: "IterableDataset",
        source: Source,
        section: Data,
        *,
        stream: int,
        seq_len: int,
        seed: int,
        tokenizer: Tokenizer,
        position: Position,
    ) -> None:
        self.position = position
        self._source, self._section, self._stream, self._seed = source, section, stream, seed
        self._tokenizer = tokenizer
        self._whole = dataset
        self._dataset = stream_of(dataset, stream, section.num_streams)
        self._seq_len = seq_len
        cut = cut_documents if section.packing == "none" else pack
        self._samples = cut(self._blocks(position.block), seq_len, position.offset)

    def row(self, item: int) -> Row:
        """Sample number `item` of the stream; never one before the position."""
        assert item >= self.position.item
        while True:
            sample, block, offset = next(self._samples)
            self.position = Position(self.position.item + 1, block, offset)
            if self.position.item > item:
                return to_row(sample, self._seq_len, self._section)

    def _blocks(self, block: Block) -> Iterator[tuple[Block, Tokens]]:
        size = max(1, self._section.shuffle_buffer // self._section.num_streams)
        while True:
            self._dataset.load_state_dict(block.cursor)
            iterator = iter(self._dataset)
            while documents := self._read(iterator, size):
                yield block, self._tokens(block, [self._text(document) for document in documents])
                block = Block(block.epoch, block.index + 1, self._dataset.state_dict())
            if block.index == 0:
                raise ValueError(self._empty())
            block = Block(block.epoch + 1)

    def _read(self, iterator: Iterator[dict[str, Any]], size: int) -> list[dict[str, Any]]:
        with reading(self._source):
            return list(itertools.islice(iterator, size))

    def _tokens(self, block: Block, texts: list[str]) -> Tokens:
        if self._section.shuffle:
            # numpy keeps raw bits of a generator the same in all versions, but not permutation().
            key = (self._seed, block.epoch, self._stream, block.index)
            bits = np.random.PCG64(np.random.SeedSequence(key)).random_raw(len(texts))
            texts = [texts[i] for i in np.argsort(bits, kind="stable")]
        threads = self._section.tokenizer_threads
        documents = self._tokenizer.encode_documents(texts, threads=threads)
        return join_documents(documents, self._tokenizer.bos_id, self._tokenizer.eos_id)

    def _text(self, document: dict[str, Any]) -> str:
        field = self._section.text_field
        if field not in document:
            near = difflib.get_close_matches(field, document, n=1)
            hint = f", did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"data.text_field={field!r} is not a field of {self._source.name}: "
                f"it has {', '.join(document)}{hint}"
            )
        text = document[field]
        if not isinstance(text, str):
            raise ValueError(
                f"data.text_field={field!r} of a document of {self._source.name} is "
                f"{text!r:.60}, expected text"
            )
        return text

    def _empty(self) -> str:
        name, num_streams = self._source.name, self._section.num_streams
        with reading(self._source):
            total = sum(1 for _ in itertools.islice(self._whole, num_streams))
        if total == 0:
            return f"{self._source.key}: {name} holds no documents"
        if total < num_streams:
            return (
                f"{name} holds {total} document{'s' * (total != 1)}, too few for "
                f"data.num_streams={num_streams}: set data.num_streams to at most {total}"
            )
        return (
            f"the files of {name} that stream {self._stream} of data.num_streams={num_streams} "
            "reads hold no documents: set a smaller data.num_streams"
        )
