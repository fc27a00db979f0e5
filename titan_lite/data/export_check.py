"""Compares an exported tokenizer with the one that trained, on the run's own text."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from tokenizers import Tokenizer as Backend

from titan_lite.config.schema import Data, Documents
from titan_lite.data.documents import BadDocument, text_of
from titan_lite.data.probes import PROBES
from titan_lite.data.sources import Source, open_dataset, reading, resolve_sources
from titan_lite.data.token_files import GOOD, TokenFolder
from titan_lite.data.tokenizer import Tokenizer

NUM_LINES = 500
# A document may be a book on one line.
_MOST_CHARS = 20_000


def export_report(
    documents: Mapping[str, Mapping[str, Any] | bytes],
    tokenizer: Tokenizer,
    section: Data | None,
    *,
    of_pairs: bool,
    origin: str = "training",
) -> tuple[bool, str]:
    """Whether exported files give the ids of a tokenizer, and a sentence about it.

    documents: as hf_documents has them. section: what the run read, if it is known. origin: whose
    ids they are.
    """
    if "tokenizer.json" not in documents:
        return False, (
            f"The tokenizer was exported as tokenizer.model alone, since {_reason(tokenizer)}: "
            f"sentencepiece gives the ids of {origin}, transformers may give others"
        )
    texts, note = list(PROBES), ""
    try:
        if section is not None:
            texts += corpus_texts(section, tokenizer)
    except ValueError as error:
        note = f"; the run's own text was not compared: {error}"
    backend = Backend.from_str(json.dumps(documents["tokenizer.json"]))
    # As in training, the spelling of a special token is text.
    backend.encode_special_tokens = True
    differing = []
    for text in texts:
        expected = tokenizer.encode(text, bos=True, eos=of_pairs)
        ids = backend.encode(text).ids
        if ids != expected:
            differing.append((text, ids, expected))
    if not differing:
        return (
            True,
            f"The exported tokenizer gives the ids of {origin} for {len(texts)} texts{note}",
        )
    text, ids, expected = differing[0]
    place = next(
        (i for i, (a, b) in enumerate(zip(ids, expected, strict=False)) if a != b),
        min(len(ids), len(expected)),
    )
    return False, (
        f"The exported tokenizer does not give the ids of {origin} for {len(differing)} of "
        f"{len(texts)} texts. The first is {text[:200]!r}: from id {place} on "
        f"{ids[place : place + 8]} instead of {expected[place : place + 8]}{note}"
    )


def corpus_texts(section: Data, tokenizer: Tokenizer) -> list[str]:
    """Lines of the run's documents, as many of each source, and the documents they are from.

    ValueError where these cannot be read.
    """
    sources = resolve_sources(section)
    tables: list[Documents] = [*section.sources] or [section]
    fields = [table.text_field for table in tables]
    texts = []
    for source, field in zip(sources, fields, strict=True):
        num_lines = 0
        with reading(source):
            for document in _documents(source, field, tokenizer):
                lines = document.splitlines(keepends=True)
                texts += [document[:_MOST_CHARS], *(line[:_MOST_CHARS] for line in lines)]
                num_lines += len(lines)
                if num_lines >= NUM_LINES // len(sources):
                    break
    return texts


def _documents(source: Source, field: str, tokenizer: Tokenizer) -> Iterator[str]:
    dataset: Any = open_dataset(source)
    if isinstance(dataset, TokenFolder):
        for row in range(dataset.first_rows[-1]):
            if dataset.use(row) == GOOD:
                yield tokenizer.decode(dataset.tokens(row))
        return
    for row in dataset:
        try:
            yield text_of(row, source.kind, field)
        except BadDocument:
            continue


def _reason(tokenizer: Tokenizer) -> str:
    from titan_lite.data.sentencepiece_json import model_json

    try:
        model_json(tokenizer.files["tokenizer.model"])
    except ValueError as error:
        return str(error)
    raise AssertionError("a tokenizer.json is possible")
