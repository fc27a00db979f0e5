"""Batches of packed samples whose contents do not depend on the data-parallel degree.

Global sample g of a run is sample g // V of stream g % V, with V = data.num_streams. Optimizer
step b trains on samples [b * global_batch_size, (b + 1) * global_batch_size); of these, rank r of D
takes those with g % D == r, in order, and reads only their streams.

With several sources, each has V streams. mixture.py chooses the source of sample g, which is then
the next sample of that source's stream g % V.

Legend: B = local_batch_size, S = seq_len.
"""

import atexit
import contextlib
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from titan_lite.config.schema import Data
from titan_lite.data.mixture import Mixture
from titan_lite.data.packing import Packing, Row, RowMaker
from titan_lite.data.settings import check_data_settings, data_settings
from titan_lite.data.sources import check_tokens, resolve_sources
from titan_lite.data.streams import Position, ShuffleBlock, Stream
from titan_lite.data.tokenizer import Tokenizer

T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """A micro-batch of one rank."""

    inputs: torch.Tensor
    """(B, S) int64"""
    labels: torch.Tensor
    """(B, S) int64: the token to predict at each input; -100 is not counted in the loss."""
    positions: torch.Tensor | None = None
    """(B, S) int64: position ids within the document; None: 0 to S - 1 in each row."""
    documents: torch.Tensor | None = None
    """(B, S) int64: document numbers, ascending; tokens attend within their document. None: each
    row is one document."""
    token_types: torch.Tensor | None = None
    """(B, S) int64: 0 or 1, the part of a pair; None: samples have no parts."""
    pair_labels: torch.Tensor | None = None
    """(B,) int64: 0 if a sample's second part follows the first, 1 if it does not; -100 is not
    counted."""
    num_tokens: torch.Tensor | None = None
    """(B,) int64: tokens of each row without padding; None: not counted by the objective."""
    sources: torch.Tensor | None = None
    """(B,) int64: the index in data.sources of each row; None without data.sources."""
    samples: torch.Tensor | None = None
    """(B,) int64: the number of each row in the run; None for validation."""

    @classmethod
    def of(cls, rows: Sequence[Row], **columns: Any) -> "Batch":
        """Stacks rows; columns: values of the fields that a Row does not have."""
        for name in vars(rows[0]):
            arrays = [getattr(row, name) for row in rows]
            columns[name] = None if arrays[0] is None else torch.from_numpy(np.stack(arrays))
        return cls(**columns)


class DataLoader:
    """Endless micro-batches of one rank, in order, prepared ahead by a worker thread.

    Raises ValueError at once for a source that does not exist. Errors in the worker are raised by
    the next() whose batch failed.
    """

    def __init__(
        self,
        section: Data,
        *,
        seq_len: int,
        seed: int,
        local_batch_size: int,
        batch_rank: int,
        batch_degree: int,
        tokenizer: Tokenizer,
        rows: RowMaker | None = None,
    ) -> None:
        """Takes rows, which turns documents into samples; None: packed by data.packing."""
        assert 0 <= batch_rank < batch_degree
        self._section, self._seed = section, seed
        self._local_batch_size = local_batch_size
        self._rank, self._degree = batch_rank, batch_degree
        self._tokenizer = tokenizer
        self._rows = rows or Packing(section, seq_len)
        self._sources = resolve_sources(section)
        check_tokens(self._sources, tokenizer)
        self._settings = data_settings(
            section, self._sources, self._rows, seq_len=seq_len, seed=seed
        )
        self._mixture = Mixture([source.weight for source in section.sources] or [1])
        self._num_samples = 0
        self._positions: dict[int, Position] = {}
        self._worker: _Worker[tuple[Batch, dict[int, Position]]] | None = None

    def __iter__(self) -> "DataLoader":
        """Starts the worker, which runs ahead from now on."""
        if self._worker is None:
            batches = self._batches(self._num_samples, dict(self._positions))
            self._worker = _Worker(batches, self._section.prefetch)
        return self

    def __next__(self) -> Batch:
        worker = iter(self)._worker
        assert worker is not None
        batch, positions = worker.get()
        self._positions |= positions
        self._num_samples += self._local_batch_size * self._degree
        return batch

    def close(self) -> None:
        """Stops the worker and discards its batches; next() would start it again."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def num_skipped(self) -> list[int]:
        """Returns the documents skipped so far in each stream; 0 if this rank does not read it."""
        return [block.skipped for block in self._blocks()]

    def state_dict(self) -> dict[str, Any]:
        """Returns the positions after the batches returned so far in this rank's streams.

        Small JSON. merge_states merges those of all ranks; any rank of any degree loads the result.
        """
        return {
            "num_samples": self._num_samples,
            "settings": self._settings,
            "streams": {str(v): self._positions[v].state() for v in sorted(self._positions)},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues after a merged state, and discards prepared batches.

        Raises ValueError naming each setting that differs from the state's: the positions are valid
        only with the same settings.
        """
        check_data_settings(self._settings, state["settings"])
        self.close()
        self._num_samples = state["num_samples"]
        mine = {v: s for v, s in state["streams"].items() if self._reads(int(v))}
        self._positions = {int(v): Position.from_state(s) for v, s in mine.items()}

    def epochs(self) -> list[list[int]]:
        """Returns how often each stream of each source was read to the end; 0 if by other ranks."""
        epochs = [block.epoch for block in self._blocks()]
        num_streams = self._section.num_streams
        return [epochs[i : i + num_streams] for i in range(0, len(epochs), num_streams)]

    def _blocks(self) -> list[ShuffleBlock]:
        """Returns the block that each stream of each source is at."""
        streams = range(len(self._sources) * self._section.num_streams)
        return [self._positions.get(v, Position()).block for v in streams]

    def _reads(self, stream: int) -> bool:
        common = int(np.gcd(self._section.num_streams, self._degree))
        return stream % common == self._rank % common

    def _batches(
        self, num_samples: int, positions: dict[int, Position]
    ) -> Iterator[tuple[Batch, dict[int, Position]]]:
        """Yields batches after the first `num_samples`, with the new positions of their streams."""
        streams: dict[int, Stream] = {}
        num_streams = self._section.num_streams
        # This rank's first sample that has not been handed out.
        sample = num_samples + (self._rank - num_samples) % self._degree
        while True:
            rows, sources, moved = [], [], {}
            samples = sample + self._degree * torch.arange(self._local_batch_size)
            for _ in range(self._local_batch_size):
                before, v = divmod(sample, num_streams)
                source = self._mixture.source(sample)
                item = self._mixture.count(source, before, start=v, stride=num_streams)
                number = source * num_streams + v
                if number not in streams:
                    streams[number] = Stream(
                        self._sources[source],
                        self._section,
                        stream=v,
                        seed=self._seed,
                        tokenizer=self._tokenizer,
                        rows=self._rows,
                        position=positions.get(number, Position()),
                    )
                rows.append(streams[number].row(item))
                sources.append(source)
                moved[number] = streams[number].position
                sample += self._degree
            of_sources = torch.tensor(sources) if self._section.sources else None
            yield Batch.of(rows, samples=samples, sources=of_sources), moved


def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns one state for the whole job, the same in every layout, from the ranks' states.

    Of ranks that share a stream, the one that has read furthest counts.
    """
    num_samples = {state["num_samples"] for state in states}
    assert len(num_samples) == 1, f"ranks are not at the same step: {num_samples}"
    streams: dict[str, dict[str, Any]] = {}
    for state in states:
        for v, position in state["streams"].items():
            if v not in streams or position["item"] > streams[v]["item"]:
                streams[v] = position
    ordered = {v: streams[v] for v in sorted(streams, key=int)}
    return {**states[0], "streams": ordered}


class _Worker(Generic[T]):
    """A daemon thread that runs an iterator up to `ahead` items ahead."""

    def __init__(self, items: Iterator[T], ahead: int) -> None:
        self._queue: queue.Queue[T | BaseException] = queue.Queue(ahead)
        self._stopped = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(
            target=self._run, args=(items,), name="titan_lite data", daemon=True
        )
        self._thread.start()
        # A daemon thread inside pyarrow at the interpreter's end would abort the process.
        atexit.register(self.close)

    def get(self) -> T:
        """Returns the next item, or raises the iterator's exception, again at each call."""
        item = self._failure or self._queue.get()
        if isinstance(item, BaseException):
            self._failure = item
            raise item
        return item

    def close(self) -> None:
        """Stops after the current item; a read that hangs is left to the daemon thread."""
        self._stopped.set()
        with contextlib.suppress(queue.Empty):
            while True:
                self._queue.get_nowait()
        self._thread.join(timeout=5)
        atexit.unregister(self.close)

    def _run(self, items: Iterator[T]) -> None:
        try:
            for item in items:
                if self._stopped.is_set():
                    return
                self._queue.put(item)
        except BaseException as error:
            self._queue.put(error)
