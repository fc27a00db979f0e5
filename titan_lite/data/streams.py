"""Streams: virtual shards of the documents, each an endless sequence of samples."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from titan_lite.config.problems import SettingError
from titan_lite.config.schema import Data
from titan_lite.data.documents import Document
from titan_lite.data.packing import Row, RowMaker, join_documents
from titan_lite.data.readers import DocumentReader
from titan_lite.data.sources import Source
from titan_lite.data.tokenizer import Tokenizer, Tokens


@dataclass(frozen=True)
class ShuffleBlock:
    """The start of a block of documents that are shuffled together."""

    epoch: int = 0
    index: int = 0
    """Number of the block in its epoch."""
    cursor: dict[str, Any] | None = None
    """The reader's position before the block; None: the start of the epoch."""
    skipped: int = 0
    """Bad documents of the stream before the block."""


@dataclass(frozen=True)
class Position:
    """The start of a stream's next sample."""

    item: int = 0
    """Samples of the stream before it."""
    block: ShuffleBlock = ShuffleBlock()
    offset: int = 0
    """Tokens of the block before the sample."""

    def state(self) -> dict[str, Any]:
        """Returns the position as JSON values."""
        return {"item": self.item, "offset": self.offset, **vars(self.block)}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Position":
        """Returns the position of a state()."""
        block = ShuffleBlock(state["epoch"], state["index"], state["cursor"], state["skipped"])
        return cls(state["item"], block, state["offset"])


class Stream:
    """The samples of one stream after a position; at the end, the next epoch starts."""

    def __init__(
        self,
        source: Source,
        section: Data,
        *,
        stream: int,
        seed: int,
        tokenizer: Tokenizer,
        rows: RowMaker,
        position: Position,
    ) -> None:
        self.position = position
        self._source, self._section, self._stream, self._seed = source, section, stream, seed
        self._tokenizer = tokenizer
        self._reader = DocumentReader(source, section, stream, tokenizer)
        blocks = self._blocks(position.block)
        key = (seed, stream)
        self._rows = rows.rows(blocks, position.offset, key=key, item=position.item)

    def row(self, item: int) -> Row:
        """Returns sample number `item` of the stream, which must not be before the position."""
        assert item >= self.position.item
        while True:
            make_row, block, offset = next(self._rows)
            self.position = Position(self.position.item + 1, block, offset)
            if self.position.item > item:
                return make_row()

    def _blocks(self, block: ShuffleBlock) -> Iterator[tuple[ShuffleBlock, Tokens]]:
        size = max(1, self._section.shuffle_buffer // self._section.num_streams)
        while True:
            self._reader.start(block.cursor)
            num_good = block.index  # Earlier blocks, if any, had usable documents.
            while True:
                num_read, documents = self._reader.read(size)
                if num_read == 0:
                    break
                num_good += len(documents)
                yield block, self._tokens(block, documents)
                skipped = block.skipped + num_read - len(documents)
                block = ShuffleBlock(block.epoch, block.index + 1, self._reader.cursor(), skipped)
            if num_good == 0:
                raise self._empty(block.skipped)
            block = ShuffleBlock(block.epoch + 1, skipped=block.skipped)

    def _tokens(self, block: ShuffleBlock, documents: Sequence[Document]) -> Tokens:
        if self._section.shuffle:
            # All versions of numpy give the same raw bits, but not the same permutation().
            key = (self._seed, block.epoch, self._stream, block.index)
            bits = np.random.PCG64(np.random.SeedSequence(key)).random_raw(len(documents))
            documents = [documents[i] for i in np.argsort(bits, kind="stable")]
        tokens = self._reader.encode(documents)
        return join_documents(tokens, self._tokenizer.bos_id, self._tokenizer.eos_id)

    def _empty(self, num_skipped: int) -> SettingError:
        if num_skipped > 0:
            return SettingError(
                self._source.key,
                f"none of the {num_skipped} documents of stream {self._stream} of "
                f"{self._source.name} is usable",
            )
        num_streams = self._section.num_streams
        total = self._reader.count(num_streams)
        if total < num_streams:
            return too_few(self._source, total, num_streams)
        return SettingError(
            "data.num_streams",
            f"stream {self._stream} of {num_streams} of {self._source.name} has no documents: set "
            "a smaller data.num_streams",
        )


def too_few(source: Source, total: int, num_streams: int) -> SettingError:
    """Returns the error of a source with fewer documents than streams."""
    if total == 0:
        return SettingError(source.key, f"{source.name} has no documents")
    return SettingError(
        "data.num_streams",
        f"{source.name} has {total} document{'s' * (total != 1)}, too few for {num_streams} "
        f"streams: set data.num_streams to at most {total}",
    )
