"""A stream: one virtual shard of the documents as an endless run of samples, with its position."""

import itertools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from titan_lite.config.schema import Data
from titan_lite.data.documents import BadDocument, is_blank, place_of, text_of
from titan_lite.data.packing import Row, Rows, join_documents
from titan_lite.data.sources import Source, reading, stream_of
from titan_lite.data.tokenizer import Tokenizer, Tokens

if TYPE_CHECKING:
    from datasets import IterableDataset

logger = logging.getLogger(__name__)

SKIP_HINT = 'data.on_bad_document = "skip" leaves such documents out'
# Not some bad documents any more, but a source that is not what the configuration says.
MAX_BAD_IN_A_ROW = 1000


@dataclass(frozen=True)
class Block:
    """Where a block of documents that are shuffled together begins."""

    epoch: int = 0
    index: int = 0
    """Number of the block in its epoch."""
    cursor: dict[str, Any] | None = None
    """State of the Hugging Face iterable before the block; None: the start of the epoch."""
    skipped: int = 0
    """Documents of the stream before it that could not be used."""


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
        block = Block(state["epoch"], state["index"], state["cursor"], state["skipped"])
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
        seed: int,
        tokenizer: Tokenizer,
        rows: Rows,
        position: Position,
    ) -> None:
        self.position = position
        self._source, self._section, self._stream, self._seed = source, section, stream, seed
        self._tokenizer = tokenizer
        self._num_bad = 0  # in a row
        self._whole = dataset
        self._dataset = stream_of(dataset, stream, section.num_streams)
        blocks = self._blocks(position.block)
        key = (seed, stream)
        self._rows = rows.rows(blocks, position.offset, key=key, item=position.item)

    def row(self, item: int) -> Row:
        """Sample number `item` of the stream; never one before the position."""
        assert item >= self.position.item
        while True:
            make_row, block, offset = next(self._rows)
            self.position = Position(self.position.item + 1, block, offset)
            if self.position.item > item:
                return make_row()

    def _blocks(self, block: Block) -> Iterator[tuple[Block, Tokens]]:
        size = max(1, self._section.shuffle_buffer // self._section.num_streams)
        while True:
            self._dataset.load_state_dict(block.cursor)
            iterator = iter(self._dataset)
            num_good = block.index  # A block before, if there was one, had some.
            while documents := self._read(iterator, size):
                texts = self._texts(documents)
                num_good += len(texts)
                yield block, self._tokens(block, texts)
                skipped = block.skipped + len(documents) - len(texts)
                cursor = self._dataset.state_dict()
                block = Block(block.epoch, block.index + 1, cursor, skipped)
            if num_good == 0:
                raise ValueError(self._empty(block.skipped))
            block = Block(block.epoch + 1, skipped=block.skipped)

    def _read(self, iterator: Iterator[dict[str, Any]], size: int) -> list[dict[str, Any]]:
        with reading(self._source):
            documents = (row for row in iterator if not is_blank(row, self._source.kind))
            return list(itertools.islice(documents, size))

    def _tokens(self, block: Block, texts: list[str]) -> Tokens:
        if self._section.shuffle:
            # numpy keeps raw bits of a generator the same in all versions, but not permutation().
            key = (self._seed, block.epoch, self._stream, block.index)
            bits = np.random.PCG64(np.random.SeedSequence(key)).random_raw(len(texts))
            texts = [texts[i] for i in np.argsort(bits, kind="stable")]
        threads = self._section.tokenizer_threads
        documents = self._tokenizer.encode_documents(texts, threads=threads)
        return join_documents(documents, self._tokenizer.bos_id, self._tokenizer.eos_id)

    def _texts(self, documents: list[dict[str, Any]]) -> list[str]:
        """Of the documents that have one; the others raise or are left out, as configured."""
        texts, source = [], self._source
        for document in documents:
            try:
                texts.append(text_of(document, source.kind, self._section.text_field))
                self._num_bad = 0
            except BadDocument as error:
                self._num_bad += 1
                too_many = self._num_bad == MAX_BAD_IN_A_ROW
                if self._section.on_bad_document == "skip" and not too_many:
                    if self._num_bad == 1:
                        logger.warning("A document of %s was skipped: %s", source.name, error)
                    continue
                place = place_of(document, source.kind, source.files)
                raise ValueError(
                    f"{source.key}: {place or f'a document of {source.name}'}: {error}; "
                    + (f"{self._num_bad} in a row" if too_many else SKIP_HINT)
                ) from None
        return texts

    def _empty(self, num_skipped: int) -> str:
        if num_skipped > 0:
            return (
                f"{self._source.key}: none of the {num_skipped} documents of stream {self._stream} "
                f"of {self._source.name} could be used"
            )
        name, num_streams = self._source.name, self._section.num_streams
        with reading(self._source):
            rows = (row for row in self._whole if not is_blank(row, self._source.kind))
            total = sum(1 for _ in itertools.islice(rows, num_streams))
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
