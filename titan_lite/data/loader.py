"""Batches of packed samples whose contents do not depend on the data-parallel degree.

Global sample g of a run is sample g // V of stream g % V, with V = data.num_streams. Optimizer
step b trains on samples [b * global_batch_size, (b + 1) * global_batch_size); of these, rank r of D
takes those with g % D == r, in order, and reads only the streams that they come from.

With several sources each has V streams of its own, and stream g % V is dealt from those of this
number: sample g is the next one of the stream of its source, which mixture.py tells.

Legend: B = local_batch_size, S = seq_len.
"""

import atexit
import contextlib
import dataclasses
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from titan_lite.config.schema import Data
from titan_lite.data.mixture import Mixture
from titan_lite.data.packing import Packing, Row, Rows
from titan_lite.data.settings import check_data_settings, data_settings
from titan_lite.data.sources import check_tokens, resolve_sources
from titan_lite.data.streams import Position, Stream
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
    """(B, S) int64, in what goes together; None: 0 to S - 1 in each row."""
    documents: torch.Tensor | None = None
    """(B, S) int64: numbers of what attends to itself only, in order; None: each row is one."""
    token_types: torch.Tensor | None = None
    """(B, S) int64: 0 or 1, the part of a pair; None: samples have no parts."""
    pair_labels: torch.Tensor | None = None
    """(B,) int64: 0 where a sample's second part follows the first, 1 where it does not; -100 is
    not counted."""
    sources: torch.Tensor | None = None
    """(B,) int64: which of data.sources each row is from; None without them."""
    samples: torch.Tensor | None = None
    """(B,) int64: the number of each row in the run; None where it is no sample of one."""

    @classmethod
    def of(cls, rows: Sequence[Row]) -> "Batch":
        """Rows of one packing, one below the other."""
        columns: dict[str, Any] = {}
        for name in vars(rows[0]):
            arrays = [getattr(row, name) for row in rows]
            columns[name] = None if arrays[0] is None else torch.from_numpy(np.stack(arrays))
        return cls(**columns)


class DataLoader:
    """Endless micro-batches of one rank, in order, prepared ahead by a worker thread.

    Raises ValueError at once for a source that cannot be found, and from next() what goes wrong in
    the worker, in its place in the order.
    """

    def __init__(
        self,
        section: Data,
        *,
        seq_len: int,
        seed: int,
        local_batch_size: int,
        global_batch_size: int,
        batch_rank: int,
        batch_degree: int,
        tokenizer: Tokenizer,
        rows: Rows | None = None,
    ) -> None:
        """rows: how documents become rows; None: packed as `section` says."""
        if global_batch_size % (local_batch_size * batch_degree):
            raise ValueError(
                f"training.global_batch_size={global_batch_size} is not a multiple of "
                f"local_batch_size * data-parallel degree = {local_batch_size} * {batch_degree}"
            )
        assert 0 <= batch_rank < batch_degree
        self._section, self._seq_len, self._seed = section, seq_len, seed
        self._local_batch_size = local_batch_size
        self._rank, self._degree = batch_rank, batch_degree
        self._tokenizer = tokenizer
        self._rows = rows or Packing(section, seq_len)
        self._sources = resolve_sources(section)
        check_tokens(self._sources, tokenizer)
        self._mixture = Mixture([source.weight for source in section.sources] or [1])
        self._num_samples = 0
        self._positions: dict[int, Position] = {}
        self._worker: _Worker[tuple[Batch, dict[int, Position]]] | None = None

    def __iter__(self) -> "DataLoader":
        """Start the worker, which from now on runs ahead."""
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
        """Stop the worker and forget what it prepared; next() would start it again."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def num_skipped(self) -> list[int]:
        """Documents of each stream left out so far; 0 where this rank does not read it."""
        streams = range(len(self._sources) * self._section.num_streams)
        return [self._positions.get(v, Position()).block.skipped for v in streams]

    def state_dict(self) -> dict[str, Any]:
        """Where the batches handed out so far end, over the streams this rank reads; small JSON.

        The states of all ranks go through merge_states, whose result any rank of any degree loads.
        """
        return {
            "num_samples": self._num_samples,
            "settings": self._settings(),
            "streams": {str(v): self._positions[v].state() for v in sorted(self._positions)},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after a merged state; what was prepared before is forgotten.

        Raises ValueError naming each setting that differs from the state's, since with it the
        positions mean nothing.
        """
        check_data_settings(self._settings(), state["settings"])
        self.close()
        self._num_samples = state["num_samples"]
        mine = {v: s for v, s in state["streams"].items() if self._reads(int(v))}
        self._positions = {int(v): Position.from_state(s) for v, s in mine.items()}

    def epochs(self) -> list[list[int]]:
        """Epochs of each source's streams: how often read to the end; 0 where others read it."""
        num_streams = self._section.num_streams
        return [
            [
                self._positions.get(source * num_streams + v, Position()).block.epoch
                for v in range(num_streams)
            ]
            for source in range(len(self._sources))
        ]

    def _settings(self) -> dict[str, Any]:
        return data_settings(
            self._section,
            self._sources,
            self._rows,
            seq_len=self._seq_len,
            seed=self._seed,
        )

    def _reads(self, stream: int) -> bool:
        common = int(np.gcd(self._section.num_streams, self._degree))
        return stream % common == self._rank % common

    def _batches(
        self, num_samples: int, positions: dict[int, Position]
    ) -> Iterator[tuple[Batch, dict[int, Position]]]:
        """Batches after the first `num_samples`, each with the new positions of its streams."""
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
            batch = dataclasses.replace(Batch.of(rows), samples=samples)
            if self._section.sources:
                batch = dataclasses.replace(batch, sources=torch.tensor(sources))
            yield batch, moved


def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One state of the whole job from the states of its ranks, the same for every layout.

    Ranks that share a stream may differ in how far they have read it: the furthest counts.
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
    """A daemon thread that runs an iterator ahead, up to a bound."""

    def __init__(self, items: Iterator[T], ahead: int) -> None:
        self._queue: queue.Queue[T | _Failure] = queue.Queue(ahead)
        self._stopped = threading.Event()
        self._failure: _Failure | None = None
        self._thread = threading.Thread(
            target=self._run, args=(items,), name="titan_lite data", daemon=True
        )
        self._thread.start()
        # A daemon thread that is inside pyarrow when the interpreter ends aborts the process.
        atexit.register(self.close)

    def get(self) -> T:
        """The next item, or the exception that took its place, again at each call."""
        item = self._failure or self._queue.get()
        if isinstance(item, _Failure):
            self._failure = item
            raise item.error
        return item

    def close(self) -> None:
        """Stop after the item in work; a read that hangs is left to its daemon thread."""
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
            self._queue.put(_Failure(error))


@dataclass(frozen=True)
class _Failure:
    error: BaseException
