"""The text of a document, or why it has none."""

import difflib
import json
from typing import Any, Literal

Kind = Literal["lines", "files", "rows", "tokens"]
"""Kind of rows: undecoded JSON lines or whole text files, columns, or "tokens" of token files."""

# One character per byte: what is not UTF-8 is a fault of its document, not of the whole file.
RAW_ENCODING = "latin-1"


class BadDocument(ValueError):
    """A document that cannot be trained on; its text is the reason.

    names_field: data.text_field may name another one than that of the text.
    """

    def __init__(self, reason: str, *, names_field: bool = False) -> None:
        super().__init__(reason)
        self.names_field = names_field


def text_of(row: dict[str, Any], kind: Kind, field: str) -> str:
    """The text of a row; raises BadDocument."""
    if kind == "rows":
        return _field(row, field)
    try:
        text = row["text"].encode(RAW_ENCODING).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise BadDocument(f"not UTF-8: byte 0x{byte:02x} at position {error.start}") from None
    if kind == "files":
        if not text:
            raise BadDocument("is empty")
        return text
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadDocument(f"not JSON: {error}") from None
    if not isinstance(document, dict):
        raise BadDocument(f"expected a JSON object, found {text:.60}")
    return _field(document, field)


def _field(document: dict[str, Any], field: str) -> str:
    if field not in document:
        near = difflib.get_close_matches(field, document, n=1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise BadDocument(
            f"{field!r} is not one of its fields: it has {', '.join(document)}{hint}",
            names_field=True,
        )
    text = document[field]
    if not isinstance(text, str):
        raise BadDocument(f"field {field!r} is {text!r:.60}, expected text", names_field=True)
    if not text:
        raise BadDocument(f"field {field!r} is empty", names_field=True)
    return text
