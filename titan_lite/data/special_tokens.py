"""Which tokens of a tokenizer begin and end a document, pad and mask, as Hugging Face's files say.

Beside a tokenizer may lie tokenizer_config.json and special_tokens_map.json, which name the special
tokens by their use; a token that they do not name is looked for by its usual spellings.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from titan_lite.config.problems import SettingError

FILE_NAMES = ("tokenizer_config.json", "special_tokens_map.json")

# use -> (keys of the files, the first that is there counts; usual spellings, likewise)
_USES = {
    "bos": (
        ("bos_token", "cls_token"),
        ("<|begin_of_text|>", "<s>", "<bos>", "[CLS]", "<|startoftext|>"),
    ),
    "eos": (
        ("eos_token", "sep_token"),
        ("<|end_of_text|>", "</s>", "<eos>", "[SEP]", "<|endoftext|>"),
    ),
    "pad": (("pad_token",), ("<|finetune_right_pad_id|>", "<pad>", "[PAD]")),
    "mask": (("mask_token",), ("<mask>", "[MASK]")),
}


@dataclass(frozen=True)
class SpecialTokens:
    """The numbers of the tokens; no BOS and no padding token: the EOS in their place."""

    bos_id: int
    eos_id: int
    pad_id: int
    mask_id: int | None


def read_beside(file: Path) -> dict[str, bytes]:
    """Contents of the files next to a tokenizer, by name."""
    found = {name: file.with_name(name) for name in FILE_NAMES}
    return {name: path.read_bytes() for name, path in found.items() if path.is_file()}


def special_tokens(
    file: Path,
    beside: Mapping[str, bytes],
    id_of: Callable[[str], int | None],
    own_ids: Mapping[str, int] = MappingProxyType({}),
) -> SpecialTokens:
    """Finds them; `id_of` gives a token's number by its spelling, None where there is none such.

    own_ids: what the tokenizer's file itself says; the files beside it count before that.

    Raises ValueError for files that are not JSON objects, for a token they name that the tokenizer
    does not have, and without EOS.
    """
    documents = {name: _document(file.with_name(name), raw) for name, raw in beside.items()}
    ids: dict[str, int | None] = {}
    for use, (keys, spellings) in _USES.items():
        named = [
            (name, key, content)
            for key in keys
            for name, document in documents.items()
            if (content := _content(document.get(key))) is not None
        ]
        if named:
            name, key, content = named[0]
            ids[use] = id_of(content)
            if ids[use] is None:
                raise SettingError(
                    "data.tokenizer_path",
                    f"{file.with_name(name)}: {key} is {content!r}, which "
                    f"{file.name} does not have",
                )
        elif use in own_ids:
            ids[use] = own_ids[use]
        else:
            known = (number for text in spellings if (number := id_of(text)) is not None)
            ids[use] = next(known, None)
    eos = ids["eos"]
    if eos is None:
        raise SettingError(
            "data.tokenizer_path",
            f"{file} has no token for the end of a document: name it in a "
            'tokenizer_config.json beside it, {"eos_token": "..."}',
        )
    bos, pad = (eos if ids[use] is None else ids[use] for use in ("bos", "pad"))
    assert bos is not None
    assert pad is not None
    return SpecialTokens(bos, eos, pad, ids["mask"])


def _document(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise SettingError("data.tokenizer_path", f"{path} is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise SettingError("data.tokenizer_path", f"{path} holds no JSON object")
    return document


def _content(named: object) -> str | None:
    """A special token is named by its text, or by an object that has it."""
    content = named.get("content") if isinstance(named, dict) else named
    return content if isinstance(content, str) else None
