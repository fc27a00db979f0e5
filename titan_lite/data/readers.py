"""How a stream gets its documents: from a dataset, whose text is tokenized, or token files."""

import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import numpy.typing as npt

from titan_lite.config.problems import SettingError
from titan_lite.config.schema import Data
from titan_lite.data.documents import BadDocument, Document, document_of
from titan_lite.data.file_rows import FileRows
from titan_lite.data.plugin_source import PluginRows
from titan_lite.data.sources import Source, reading, stream_of
from titan_lite.data.token_files import GOOD, RowsOfStream, TokenFolder
from titan_lite.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from datasets import IterableDataset

logger = logging.getLogger(__name__)

SKIP_HINT = 'data.on_bad_document = "skip" leaves such documents out'
# Not some bad documents any more, but a source that is not what the configuration says.
MAX_BAD_IN_A_ROW = 1000

AnyDocument = TypeVar("AnyDocument")


class Reader(Protocol, Generic[AnyDocument]):
    """The documents of one stream, once."""

    def start(self, cursor: dict[str, Any] | None) -> None:
        """Go to a place; None: before the first document."""

    def cursor(self) -> dict[str, Any]:
        """The place after what was read; small JSON."""

    def read(self, size: int) -> tuple[int, list[AnyDocument]]:
        """Number of the next documents, up to `size`, and those that can be used; 0 at the end."""

    def encode(self, documents: Sequence[AnyDocument]) -> Sequence[npt.NDArray[Any]]:
        """Tokens of documents, without BOS and EOS."""

    def count(self, limit: int) -> int:
        """Documents of all streams, counted up to a limit; those that cannot be used are some."""


class DatasetReader:
    """Texts or token ids of a Hugging Face dataset or local files."""

    def __init__(
        self,
        dataset: "IterableDataset | FileRows | PluginRows",
        source: Source,
        section: Data,
        stream: int,
        tokenizer: Tokenizer,
    ) -> None:
        self._whole, self._source, self._section = dataset, source, section
        self._dataset = stream_of(dataset, stream, section.num_streams)
        self._tokenizer = tokenizer
        self._judge = Judge(source, skip=section.on_bad_document == "skip")
        self._rows: Iterator[dict[str, Any]] = iter(())

    def start(self, cursor: dict[str, Any] | None) -> None:
        self._dataset.load_state_dict(cursor)
        self._rows = iter(self._dataset)

    def cursor(self) -> dict[str, Any]:
        state: dict[str, Any] = self._dataset.state_dict()
        return state

    def read(self, size: int) -> tuple[int, list[Document]]:
        source, documents, num_read = self._source, list[Document](), 0
        with reading(source):
            for row in itertools.islice(self._rows, size):
                num_read += 1
                try:
                    document = document_of(row, source.kind, source.text_field, source.tokens_field)
                except BadDocument as error:
                    self._judge.bad(error, self._place())
                    continue
                self._judge.good()
                if not isinstance(document, str):
                    document = self._content(document)
                documents.append(document)
        return num_read, documents

    def encode(self, documents: Sequence[Document]) -> Sequence[npt.NDArray[Any]]:
        threads = self._section.tokenizer_threads
        texts = [document for document in documents if isinstance(document, str)]
        encoded = iter(self._tokenizer.encode_documents(texts, threads=threads))
        return [next(encoded) if isinstance(each, str) else each for each in documents]

    def count(self, limit: int) -> int:
        with reading(self._source):
            return sum(1 for _ in itertools.islice(self._whole, limit))

    def _content(self, tokens: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Token ids without the BOS and EOS around them, which the stream adds."""
        tokenizer, source = self._tokenizer, self._source
        least, most = int(tokens.min()), int(tokens.max())
        if least < 0 or most >= tokenizer.vocab_size:
            place, token = self._place() or source.name, least if least < 0 else most
            raise SettingError(
                source.key,
                f"{place}: token id {token} is outside the tokenizer's vocabulary of "
                f"{tokenizer.vocab_size:,}; set data.tokenizer_path to the tokenizer that made it",
            )
        start = int(tokens[0] == tokenizer.bos_id)
        end = len(tokens) - int(tokens[-1] == tokenizer.eos_id)
        return tokens[start:end]

    def _place(self) -> str:
        return self._dataset.place() if isinstance(self._dataset, FileRows) else ""


class TokenReader:
    """Rows of a folder that `titan-lite tokenize` wrote."""

    def __init__(self, folder: TokenFolder, stream: int, num_streams: int) -> None:
        self._folder = folder
        self._rows = RowsOfStream(folder, stream, num_streams)
        self._next = 0

    def start(self, cursor: dict[str, Any] | None) -> None:
        self._next = cursor["row"] if cursor else 0

    def cursor(self) -> dict[str, Any]:
        return {"row": self._next}

    def read(self, size: int) -> tuple[int, list[int]]:
        end = min(self._next + size, self._rows.size)
        rows = [self._rows[number] for number in range(self._next, end)]
        self._next = end
        return len(rows), [row for row in rows if self._folder.use(row) == GOOD]

    def encode(self, documents: Sequence[int]) -> Sequence[npt.NDArray[Any]]:
        return [self._folder.tokens(row) for row in documents]

    def count(self, limit: int) -> int:
        manifest = self._folder.manifest
        return min(limit, manifest.documents + manifest.skipped)


class Judge:
    """The policy of `data.on_bad_document` for documents that cannot be used."""

    def __init__(self, source: Source, *, skip: bool) -> None:
        self._source, self._skip = source, skip
        self._in_a_row = 0

    def good(self) -> None:
        """A document can be used."""
        self._in_a_row = 0

    def bad(self, error: BadDocument, place: str) -> None:
        """One cannot: raises SettingError naming its place, unless it is to be left out."""
        source = self._source
        self._in_a_row += 1
        too_many = self._in_a_row == MAX_BAD_IN_A_ROW
        if self._skip and not too_many:
            if self._in_a_row == 1:
                logger.warning("A document of %s was skipped: %s", source.name, error)
            return
        # The table of the key that chose the source has the field's, too.
        table = source.key.rpartition(".")[0]
        raise SettingError(
            f"{table}.{error.key}" if error.key else source.key,
            f"{place or f'a document of {source.name}'}: {error}; "
            + (f"{self._in_a_row} in a row" if too_many else SKIP_HINT),
        )
