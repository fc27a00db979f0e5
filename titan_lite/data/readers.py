"""Reads the documents of a stream and tokenizes their text."""

import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy.typing as npt

from titan_lite.config.problems import SettingError
from titan_lite.config.schema import Data
from titan_lite.data.documents import BadDocument, Document, document_of
from titan_lite.data.file_rows import FileRows
from titan_lite.data.sources import Source, reading
from titan_lite.data.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

SKIP = 'data.on_bad_document = "skip"'
# More bad documents in a row suggest a wrong configuration, and end the run.
MAX_BAD_IN_A_ROW = 1000


class DocumentReader:
    """The documents of one stream, once: texts or token ids."""

    def __init__(
        self,
        source: Source,
        section: Data,
        stream: int,
        tokenizer: Tokenizer,
    ) -> None:
        self._source, self._section = source, section
        self._dataset = source.open(stream, section.num_streams)
        self._tokenizer = tokenizer
        self._policy = BadDocumentPolicy(source, section)
        self._rows: Iterator[dict[str, Any]] = iter(self._dataset)

    def start(self, cursor: dict[str, Any] | None) -> None:
        """Moves to a cursor(); None: before the first document."""
        self._dataset.load_state_dict(cursor)
        self._rows = iter(self._dataset)

    def cursor(self) -> dict[str, Any]:
        """Returns the position after the last document that was read; small JSON."""
        return self._dataset.state_dict()

    def read(self, size: int) -> tuple[int, list[Document]]:
        """Reads up to `size` documents; returns their number, 0 at the end, and the usable ones."""
        with reading(self._source):
            documents = [self._document(row) for row in itertools.islice(self._rows, size)]
        return len(documents), [document for document in documents if document is not None]

    def encode(self, documents: Sequence[Document]) -> Sequence[npt.NDArray[Any]]:
        """Returns the tokens of documents, without BOS and EOS."""
        threads = self._section.tokenizer_threads
        texts = [document for document in documents if isinstance(document, str)]
        encoded = iter(self._tokenizer.encode_documents(texts, threads=threads))
        return [next(encoded) if isinstance(each, str) else each for each in documents]

    def count(self, limit: int) -> int:
        """Counts the documents of all streams up to a limit, including bad ones."""
        with reading(self._source):
            return sum(1 for _ in itertools.islice(self._source.open(), limit))

    def _document(self, row: dict[str, Any]) -> Document | None:
        """Returns the document of a row; None if it is skipped."""
        source = self._source
        if source.manifest:
            # A bad document was written as null.
            tokens = row[source.tokens_field]
            return None if tokens is None else self._checked(tokens)
        document = self._policy.document(row, self._dataset)
        if document is None or isinstance(document, str):
            return document
        tokens = self._checked(document)
        # The stream adds BOS and EOS.
        start = int(tokens[0] == self._tokenizer.bos_id)
        return tokens[start : len(tokens) - int(tokens[-1] == self._tokenizer.eos_id)]

    def _checked(self, tokens: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Returns the token ids; SettingError if one is not in the vocabulary."""
        vocab_size = self._tokenizer.vocab_size
        if tokens.size and (tokens.min() < 0 or tokens.max() >= vocab_size):
            outside = tokens[(tokens < 0) | (tokens >= vocab_size)][0]
            raise SettingError(
                self._source.key,
                f"{position_of(self._dataset) or self._source.name}: token id {outside} is outside "
                f"the tokenizer's vocabulary of {vocab_size:,}; set data.tokenizer_path to the "
                "tokenizer that made it",
            )
        return tokens


class BadDocumentPolicy:
    """The policy of data.on_bad_document for bad documents."""

    def __init__(self, source: Source, section: Data) -> None:
        self._source, self._skip = source, section.on_bad_document == "skip"
        self._in_a_row = 0

    def document(self, row: dict[str, Any], rows: object) -> Document | None:
        """Returns the document of the last row that was read from `rows`.

        A bad one is counted and logged, and None is returned; SettingError if it must not be
        skipped.
        """
        source = self._source
        try:
            document = document_of(row, source.kind, source.text_field, source.tokens_field)
        except BadDocument as error:
            self._bad(error, rows)
            return None
        self._in_a_row = 0
        return document

    def _bad(self, error: BadDocument, rows: object) -> None:
        source = self._source
        self._in_a_row += 1
        too_many = self._in_a_row == MAX_BAD_IN_A_ROW
        if self._skip and not too_many:
            if self._in_a_row == 1:
                logger.warning("A document of %s was skipped: %s", source.name, error)
            return
        hint = f"{SKIP} leaves such documents out"
        if too_many:
            hint = f"{self._in_a_row:,} bad documents in a row end the run, even with {SKIP}"
        raise SettingError(
            f"{source.table}.{error.key}" if error.key else source.key,
            f"{position_of(rows) or f'a document of {source.name}'}: {error}; {hint}",
        )


def position_of(rows: object) -> str:
    """Returns file and line, or file and row, of the last row that was read; "" if unknown."""
    return rows.place() if isinstance(rows, FileRows) else ""
