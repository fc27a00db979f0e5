"""The special tokens of a tokenizer: BOS, EOS, padding and mask.

They are named by the companion files of Hugging Face, tokenizer_config.json and
special_tokens_map.json, next to a tokenizer. A token that is not named there is searched by its
usual spellings.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from titan_lite.runtime.stored_files import json_object

FILE_NAMES = ("tokenizer_config.json", "special_tokens_map.json")

# use -> (keys of the companion files, usual spellings); the first one that exists counts.
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


def read_companions(file: Path) -> dict[str, bytes]:
    """Returns the contents of the files next to a tokenizer, by name."""
    paths = map(file.with_name, FILE_NAMES)
    return {path.name: path.read_bytes() for path in paths if path.is_file()}


def special_tokens(
    file: Path,
    companions: Mapping[str, bytes],
    id_of: Callable[[str], int | None],
    own_ids: Mapping[str, int] = MappingProxyType({}),
) -> tuple[int, int, int, int | None]:
    """Returns the ids of BOS, EOS, padding and mask; a missing BOS or padding is the EOS.

    id_of: returns a token's id by its spelling, None if there is no such token. own_ids: named by
    the tokenizer's file itself; companion files take precedence. Raises ValueError for companion
    files that are not JSON objects, for a named token that the tokenizer does not have, and for a
    tokenizer without EOS.
    """
    documents = {name: json_object(file.with_name(name), raw) for name, raw in companions.items()}
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
                raise ValueError(
                    f"{file.with_name(name)}: {key} is {content!r}, which is not a token of "
                    f"{file.name}"
                )
        else:
            known = (number for text in spellings if (number := id_of(text)) is not None)
            ids[use] = own_ids[use] if use in own_ids else next(known, None)
    eos = ids["eos"]
    if eos is None:
        raise ValueError(
            f"{file} has no token for the end of a document: name it in a tokenizer_config.json "
            'next to it, {"eos_token": "..."}'
        )
    bos, pad = (eos if (number := ids[use]) is None else number for use in ("bos", "pad"))
    return bos, eos, pad, ids["mask"]


def _content(named: object) -> str | None:
    """Returns the text of a special token, which is named by its text or by an object."""
    content = named.get("content") if isinstance(named, dict) else named
    return content if isinstance(content, str) else None
