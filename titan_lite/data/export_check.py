"""Compares an exported tokenizer with the one that trained, on the run's own text."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import cycle
from typing import Any

from tokenizers import Tokenizer as Backend

from titan_lite.config.schema import Data
from titan_lite.data.documents import BadDocument, document_of
from titan_lite.data.probes import PROBES, SPACE_KINDS
from titan_lite.data.sources import Source, reading, resolve_sources
from titan_lite.data.tokenizer import Tokenizer

NUM_LINES = 500
README = "README.md"
# Longer documents and lines are cut.
_MOST_CHARS = 20_000


@dataclass(frozen=True)
class ExportReport:
    """The result of comparing an exported tokenizer with the one of training."""

    is_same: bool
    """True if all texts get the same ids as in training, where special tokens' names are text."""
    sentence: str

    def readme(self) -> bytes:
        """A README.md for the exported folder."""
        text = self.sentence.replace("\n", " ")
        return f"# Tokenizer\n\n{text}.\n".encode()


def export_report(
    documents: Mapping[str, Mapping[str, Any] | bytes],
    tokenizer: Tokenizer,
    section: Data | None,
    *,
    of_pairs: bool,
    origin: str = "training",
) -> ExportReport:
    """Compares the ids of exported files with those of a tokenizer.

    documents: as returned by hf_documents. section: what the run read, if it is known. origin: the
    name of the tokenizer in the sentence.
    """
    if "tokenizer.json" not in documents:
        return ExportReport(
            False,
            f"The tokenizer cannot be exported as tokenizer.json ({_reason(tokenizer)}). "
            "tokenizer.model is exported; transformers may compute other ids from it than "
            "sentencepiece",
        )
    texts, note = list(PROBES), ""
    try:
        if section is not None:
            texts += with_spaces(corpus_texts(section, tokenizer))
    except ValueError as error:
        note = f"; the run's own text was not compared: {error}"
    backend = Backend.from_str(json.dumps(documents["tokenizer.json"]))
    num_texts = f"{len(texts):,} texts"
    # As in training, the spelling of a special token is text.
    backend.encode_special_tokens = True
    expected = [tokenizer.encode(text, bos=True, eos=of_pairs) for text in texts]
    as_text = [encoding.ids for encoding in backend.encode_batch(texts)]
    if example := _differences(texts, as_text, expected):
        return ExportReport(
            False,
            f"The exported tokenizer gives other ids than {origin} for {example[0]:,} of "
            f"{num_texts}{note}. {example[1]}",
        )
    sentence = f"The exported tokenizer gives the same ids as {origin} for {num_texts}{note}"
    # The default of transformers.
    backend.encode_special_tokens = False
    as_tokens = [encoding.ids for encoding in backend.encode_batch(texts)]
    if example := _differences(texts, as_tokens, expected):
        sentence = (
            f"{sentence}; {example[0]:,} of them contain a special token's text. Training reads "
            f"it as text; transformers does so only with split_special_tokens=True. {example[1]}"
        )
    return ExportReport(True, sentence)


def _differences(
    texts: list[str], ids: list[list[int]], expected: list[list[int]]
) -> tuple[int, str] | None:
    """Returns the number of texts with other ids and a sentence about the first; None if none."""
    differing = [row for row in zip(texts, ids, expected, strict=True) if row[1] != row[2]]
    if not differing:
        return None
    text, a, b = differing[0]
    place = next(
        (i for i, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1]),
        min(len(a), len(b)),
    )
    return len(differing), (
        f"The first is {text[:200]!r}: at position {place} the ids are {a[place : place + 8]} "
        f"instead of {b[place : place + 8]}"
    )


def corpus_texts(section: Data, tokenizer: Tokenizer) -> list[str]:
    """Returns documents of the run and their lines, the same number of lines from each source.

    Raises ValueError if they cannot be read.
    """
    sources, texts = resolve_sources(section), []
    for source in sources:
        num_lines = 0
        with reading(source):
            for document in _documents(source, tokenizer):
                lines = document.splitlines(keepends=True)
                texts += [document[:_MOST_CHARS], *(line[:_MOST_CHARS] for line in lines)]
                num_lines += len(lines)
                if num_lines >= NUM_LINES // len(sources):
                    break
    return texts


def with_spaces(texts: list[str]) -> list[str]:
    """Returns each text, followed by the text with other white space around it and in it."""
    kinds = cycle((*SPACE_KINDS, "  ", "\n\n", " " * 8, "\t\t", " \n"))
    pairs = zip(texts, kinds, strict=False)
    return [
        each for text, kind in pairs for each in (text, kind + text.replace(" ", kind, 2) + kind)
    ]


def _documents(source: Source, tokenizer: Tokenizer) -> Iterator[str]:
    for row in source.open():
        try:
            document = document_of(row, source.kind, source.text_field, source.tokens_field)
        except BadDocument:
            continue
        yield document if isinstance(document, str) else tokenizer.decode(document)


def _reason(tokenizer: Tokenizer) -> str:
    from titan_lite.data.sentencepiece_json import sentencepiece_backend

    try:
        sentencepiece_backend(tokenizer.files["tokenizer.model"])
    except ValueError as error:
        return str(error)
    raise AssertionError("a tokenizer.json is possible")
