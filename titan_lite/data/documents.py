"""Gets the document of a row: its text or its token ids."""

import difflib
import json
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Kind = Literal["lines", "files", "rows"]
"""Kind of rows: undecoded JSON lines, whole text files, or columns."""
Document = str | npt.NDArray[Any]

# One character per byte, so that bytes that are not UTF-8 spoil one document, not the file.
RAW_ENCODING = "latin-1"
TOKENS_FIELD = "input_ids"
"""Column of token ids in the datasets of Hugging Face's tokenizers."""


class BadDocument(ValueError):
    """A document that cannot be trained on, with the reason.

    key: the key of [data] that names the field; "" if the field is not the problem.
    """

    def __init__(self, reason: str, *, key: str = "") -> None:
        super().__init__(reason)
        self.key = key


def document_of(row: dict[str, Any], kind: Kind, text_field: str, tokens_field: str) -> Document:
    """Returns the token ids or the text of a row; raises BadDocument."""
    if kind != "rows":
        text = _decoded(row["text"])
        if kind == "files":
            if not text:
                raise BadDocument("is empty")
            return text
        row = _parsed(text)
    if tokens_field:
        return _tokens(row, tokens_field)
    if text_field not in row and TOKENS_FIELD in row:
        return _tokens(row, TOKENS_FIELD)
    return _text(row, text_field)


def _decoded(raw: str) -> str:
    try:
        return raw.encode(RAW_ENCODING).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise BadDocument(f"not UTF-8: byte 0x{byte:02x} at position {error.start}") from None


def _parsed(text: str) -> dict[str, Any]:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadDocument(f"not JSON: {error}") from None
    if not isinstance(document, dict):
        raise BadDocument(f"expected a JSON object, got {text:.60}")
    return document


def _text(document: dict[str, Any], field: str) -> str:
    text = _field(document, field, "text_field")
    if not isinstance(text, str):
        raise BadDocument(f"field {field!r} is {text!r:.60}, expected text", key="text_field")
    if not text:
        raise BadDocument(f"field {field!r} is empty", key="text_field")
    return text


def _tokens(document: dict[str, Any], field: str) -> npt.NDArray[Any]:
    tokens = _field(document, field, "tokens_field")
    if not isinstance(tokens, np.ndarray):
        is_ids = isinstance(tokens, list) and all(type(token) is int for token in tokens)
        if not is_ids:
            raise BadDocument(
                f"field {field!r} is {tokens!r:.60}, expected a list of token ids",
                key="tokens_field",
            )
        tokens = np.array(tokens, np.int64)
    if not tokens.size:
        raise BadDocument(f"field {field!r} is empty", key="tokens_field")
    return tokens


def _field(document: dict[str, Any], field: str, key: str) -> Any:
    if field not in document:
        near = difflib.get_close_matches(field, document, n=1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise BadDocument(
            f"{field!r} is not one of its fields: it has {', '.join(document)}{hint}", key=key
        )
    return document[field]
