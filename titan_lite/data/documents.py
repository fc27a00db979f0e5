"""The text of a document, or why it has none."""

import difflib
import json
from typing import Any, Literal

Kind = Literal["lines", "files", "rows", "tokens"]
"""Of rows: JSON lines and whole text files, both undecoded, or columns; "tokens" of token files."""

# One character per byte: what is not UTF-8 is a fault of its document, not of the whole file.
RAW_ENCODING = "latin-1"


class BadDocument(ValueError):
    """A document that cannot be trained on; its text is the reason."""


def text_of(row: dict[str, Any], kind: Kind, field: str, key: str = "data.text_field") -> str:
    """The text of a row; raises BadDocument. key: that chose the field."""
    if kind == "rows":
        return _field(row, field, key)
    try:
        text = row["text"].encode(RAW_ENCODING).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise BadDocument(f"not UTF-8: byte 0x{byte:02x} at position {error.start}") from None
    if kind == "files":
        return _field({field: text}, field, key)
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadDocument(f"not JSON: {error}") from None
    if not isinstance(document, dict):
        raise BadDocument(f"expected a JSON object, found {text:.60}")
    return _field(document, field, key)


def _field(document: dict[str, Any], field: str, key: str) -> str:
    if field not in document:
        near = difflib.get_close_matches(field, document, n=1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise BadDocument(
            f"{key}={field!r} is not one of its fields: it has {', '.join(document)}{hint}"
        )
    text = document[field]
    if not isinstance(text, str):
        raise BadDocument(f"{key}={field!r} is {text!r:.60}, expected text")
    if not text:
        raise BadDocument(f"{key}={field!r} is empty")
    return text
