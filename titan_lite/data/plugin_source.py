"""Documents of a plugin's data source, read as the rows of a dataset."""

from collections.abc import Iterator
from typing import Any, Protocol

from titan_lite.data.documents import TOKENS_FIELD, Document


class Reader(Protocol):
    """The documents of one stream: texts, or arrays of token ids without BOS and EOS."""

    def __iter__(self) -> Iterator[Document]:
        """Reads on from the place that was set last, or from the first document."""

    def state_dict(self) -> dict[str, Any]:
        """The place after the last document that was read; small JSON."""

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Sets the place; None: before the first document."""


class PluginSource(Protocol):
    """A set of documents, as a function of the registry SOURCES returns it."""

    identity: str
    """The same for the same documents: a resumed run compares it."""

    def open(self, stream: int, num_streams: int) -> Reader:
        """Opens one of the streams, which together hold each document once."""


class PluginRows:
    """One stream of a plugin's source, or all of it, as rows."""

    def __init__(self, source: PluginSource, stream: int = 0, num_streams: int = 1) -> None:
        self._source, self._reader = source, source.open(stream, num_streams)
        self.load_state_dict = self._reader.load_state_dict
        self.state_dict = self._reader.state_dict

    @property
    def num_shards(self) -> int:
        """Number of parts that titan-lite tokenize reads one by one."""
        return 1

    def shard(self, num_shards: int, index: int, *, contiguous: bool) -> "PluginRows":
        """All documents."""
        return PluginRows(self._source)

    def stream(self, stream: int, num_streams: int) -> "PluginRows":
        """Opens one stream."""
        return PluginRows(self._source, stream, num_streams)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The documents, each as a row with a field of text or token ids."""
        for document in self._reader:
            yield {"text" if isinstance(document, str) else TOKENS_FIELD: document}
