"""The interface of a plugin's data source, whose documents are read as rows of a dataset."""

from collections.abc import Iterator
from typing import Any, Protocol

from titan_lite.data.documents import TOKENS_FIELD, Document


class Reader(Protocol):
    """The documents of one stream: texts, or arrays of token ids without BOS and EOS."""

    def __iter__(self) -> Iterator[Document]:
        """Yields documents after the loaded position, or from the first one."""

    def state_dict(self) -> dict[str, Any]:
        """Returns the position after the last document that was read; small JSON."""

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Sets the position; None: before the first document."""


class PluginSource(Protocol):
    """A set of documents, returned by a function of the registry SOURCES."""

    identity: str
    """A name that is the same for the same documents; a resumed run compares it."""

    def open(self, stream: int, num_streams: int) -> Reader:
        """Opens one of the streams, which together have each document once."""


class RowStream(Protocol):
    """The rows of one stream."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yields rows after the loaded position, or from the first one."""

    def state_dict(self) -> Any:
        """Returns the position after the last row that was read; small JSON."""

    def load_state_dict(self, state: Any, /) -> None:
        """Sets the position; None: before the first row."""


class PluginRows:
    """The documents of a plugin's reader, as rows."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self.load_state_dict = reader.load_state_dict
        self.state_dict = reader.state_dict

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yields each document as a row with a field of text or token ids."""
        for document in self._reader:
            yield {"text" if isinstance(document, str) else TOKENS_FIELD: document}
