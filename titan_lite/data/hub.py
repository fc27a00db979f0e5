"""Datasets of the Hugging Face hub, streamed by `datasets`, which is imported on first use."""

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from titan_lite.data.plugin_source import RowStream

if TYPE_CHECKING:
    from datasets import IterableDataset


@dataclass(frozen=True)
class HubDataset:
    """A dataset by name."""

    arguments: dict[str, Any]
    """Arguments of datasets.load_dataset."""

    def __reduce__(self) -> Any:
        # Without what this process has opened.
        return type(self), (self.arguments,)

    @property
    def num_files(self) -> int:
        """Number of shards."""
        return int(self._dataset.num_shards)

    def open(self, stream: int, num_streams: int) -> RowStream:
        """Opens one of the streams: whole shards, or every num_streams-th row of all."""
        if self._dataset.num_shards >= num_streams:
            return self._dataset.shard(num_shards=num_streams, index=stream, contiguous=False)
        from datasets.distributed import split_dataset_by_node

        return split_dataset_by_node(self._dataset, rank=stream, world_size=num_streams)

    @functools.cached_property
    def _dataset(self) -> "IterableDataset":
        import datasets

        datasets.disable_progress_bars()
        return datasets.load_dataset(**self.arguments, streaming=True)
