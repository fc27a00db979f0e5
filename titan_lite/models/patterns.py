"""Patterns of dotted names, in which `*` matches within one part.

`layers.*.attention.w[qkv]` matches `layers.3.attention.wq`; a `*` never spans a dot.
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase


def matches(pattern: str, name: str) -> bool:
    """Returns True if a dotted name has as many parts as the pattern, and each part matches."""
    patterns, parts = pattern.split("."), name.split(".")
    return len(patterns) == len(parts) and all(map(fnmatchcase, parts, patterns))


def translate(name: str, table: Mapping[str, str]) -> str:
    """Translates a name by a table of patterns; each `*` is a whole part, in the same order.

    An additional `*` in the target stays: it is the number of an expert. Family.hf_key_map maps our
    names to those of Hugging Face. KeyError if no row matches.
    """
    for source, target in table.items():
        if matches(source, name):
            wildcards = zip(source.split("."), name.split("."), strict=True)
            values = (part for pattern, part in wildcards if pattern == "*")
            parts = target.split(".")
            return ".".join(next(values, "*") if part == "*" else part for part in parts)
    raise KeyError(f"{name} is matched by no row of {sorted(table)}")
