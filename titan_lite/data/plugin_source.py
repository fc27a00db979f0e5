"""The interface of a plugin's data source, whose documents are read as rows of a dataset."""

from collections.abc import Iterator
from typing import Any, Protocol, TypeVar

from titan_lite.data.documents import TOKENS_FIELD, Document

Item = TypeVar("Item", covariant=True)


class Reader(Protocol[Item]):
    """One stream: of a plugin, its documents, texts or arrays of token ids without BOS and EOS."""

    def __iter__(self) -> Iterator[Item]:
        """Yields items after the loaded position, or from the first one."""

    def state_dict(self) -> Any:
        """Returns the position after the last item that was read; small JSON."""

    def load_state_dict(self, state: Any, /) -> None:
        """Sets the position; None: before the first item."""


RowStream = Reader[dict[str, Any]]


class PluginSource(Protocol):
    """A set of documents, returned by a function of the registry SOURCES."""

    identity: str
    """A name that is the same for the same documents; a resumed run compares it."""

    def open(self, stream: int, num_streams: int) -> Reader[Document]:
        """Opens one of the streams, which together have each document once."""


class PluginDocuments:
    """Opens the documents of a plugin's source as rows."""

    num_files = 1

    def __init__(self, source: PluginSource) -> None:
        self._source = source

    def open(self, stream: int, num_streams: int) -> RowStream:
        """Opens one of the streams."""
        return PluginRows(self._source.open(stream, num_streams))


class PluginRows:
    """The documents of a plugin's reader, as rows."""

    def __init__(self, reader: Reader[Document]) -> None:
        self._reader = reader
        self.load_state_dict = reader.load_state_dict
        self.state_dict = reader.state_dict

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yields each document as a row with a field of text or token ids."""
        for document in self._reader:
            yield {"text" if isinstance(document, str) else TOKENS_FIELD: document}
