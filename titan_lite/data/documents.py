"""Gets the document of a row: its text or its token ids."""

import difflib
import json
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from titan_lite.config.problems import quote

Kind = Literal["lines", "files", "rows"]
"""Kind of rows: undecoded JSON lines, whole text files, or columns."""
Document = str | npt.NDArray[Any]

# One character per byte, so that bytes that are not UTF-8 spoil one document, not the file.
RAW_ENCODING = "latin-1"
# First bytes of content that is not plain text, and what to do with it.
_REMEDIES = {
    b"\x1f\x8b": "it is compressed by gzip: decompress it, or name it .gz",
    b"BZh": "it is compressed by bzip2: decompress it, or name it .bz2",
    b"\xfd7zXZ": "it is compressed by xz: decompress it, or name it .xz",
    b"\x28\xb5\x2f\xfd": "it is compressed by zstd: decompress it, or name it .zst",
    b"PK\x03\x04": "it is a zip archive: unpack it",
    b"PAR1": "it is Parquet: name it .parquet",
    b"\xff\xfe": "it is UTF-16: convert it, as by iconv -f UTF-16 -t UTF-8",
    b"\xfe\xff": "it is UTF-16: convert it, as by iconv -f UTF-16 -t UTF-8",
}
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
    # In rows of columns, only the chosen field is read; the others are None.
    if text_field not in row and row.get(TOKENS_FIELD) is not None:
        return _tokens(row, TOKENS_FIELD)
    return _text(row, text_field)


def _decoded(raw: str) -> str:
    content = raw.encode(RAW_ENCODING)
    try:
        text = content.decode("utf-8-sig")
        if "\0" not in text:
            return text
        reason = f"has a NUL byte at position {text.index(chr(0))}, as UTF-16 and binary files do"
    except UnicodeDecodeError as error:
        reason = f"not UTF-8: byte 0x{error.object[error.start]:02x} at position {error.start}"
    known = (remedy for start, remedy in _REMEDIES.items() if content.startswith(start))
    raise BadDocument("; ".join([reason, *known]))


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
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadDocument(
            f"field {field!r} has half of a surrogate pair, \\u{ord(text[error.start]):04x} at "
            f"position {error.start}, which is not a character"
        ) from None
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
        try:
            tokens = np.array(tokens, np.int64)
        except OverflowError:
            raise BadDocument(f"token id {max(tokens, key=abs)} takes more than 64 bits") from None
    if not tokens.size:
        raise BadDocument(f"field {field!r} is empty", key="tokens_field")
    return tokens


def _field(document: dict[str, Any], field: str, key: str) -> Any:
    if field not in document:
        is_text = key == "text_field"
        fitting = [name for name, value in document.items() if isinstance(value, str) == is_text]
        near = difflib.get_close_matches(field, document, n=1) or fitting
        names = ", ".join(map(quote, document)) or "none"
        hint = f"; set {key} = {quote(near[0])}" if len(near) == 1 else ""
        raise BadDocument(f"no field {quote(field)}; its fields: {names}{hint}", key=key)
    return document[field]
