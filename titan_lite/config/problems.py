"""The wording of configuration errors: problems, their one block, and nearest names."""

import contextlib
import difflib
import json
import os
import re
import types
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date, time
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from titan_lite.config.needs import Variant
from titan_lite.config.registry import Registry
from titan_lite.config.schema import TAGGED, Config
from titan_lite.config.section import Section

SECTIONS: dict[str, type[Section]] = {name: type(section) for name, section in Config()}
FIELDS = {
    section: TAGGED[section].fields if section in TAGGED else dict(model.model_fields)
    for section, model in SECTIONS.items()
}
BOUNDS = {"gt": "greater than", "ge": "of at least", "lt": "less than", "le": "of at most"}
_HUB_NAME = re.compile(
    r"(?:(?:https?://)?(?:huggingface\.co|hf\.co)/|hf://)?(?:datasets/|models/)?"
    r"(?P<name>[a-zA-Z0-9][\w.-]*(?:/[\w.-]+)?)(?:@[\w.-]+)?(?:/(?:tree|blob|resolve)/.*)?/?",
    re.ASCII,
)
_SUFFIX = re.compile(r"\.[a-z]+\d?$")


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong; `key` is empty when it concerns the whole source."""

    key: str
    source: str
    message: str


class ConfigError(ValueError):
    """All problems of a configuration; its text is the block a user reads."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(dict.fromkeys(problems))
        super().__init__(self._block())

    def __reduce__(self) -> Any:
        # Exceptions pass between processes by their arguments, here the text alone.
        return type(self), (self.problems,)

    def _block(self) -> str:
        count = len(self.problems)
        # A long key, as of a malformed override, pushes its own source, not everybody's.
        keys = [p.key if p.key.isprintable() else quote(p.key) for p in self.problems]
        width = max((len(key) for key in keys if len(key) <= 40), default=0)
        lines = [f"titan-lite: {count} problem{'s' * (count != 1)} in the configuration"]
        for p, key in zip(self.problems, keys, strict=True):
            where = f"{key:<{width}} ({p.source})" if key else p.source
            lines.append(f"  {where}: {p.message}")
        return "\n".join(lines)


class SettingError(ValueError):
    """A setting that cannot work, raised where its key is known.

    keys: the key at fault, or several: the last one that was set, else the first.
    """

    def __init__(self, keys: str | Sequence[str], message: str) -> None:
        super().__init__(keys, message)
        self.keys = (keys,) if isinstance(keys, str) else tuple(keys)
        self.message = message

    def __str__(self) -> str:
        return f"{self.keys[0]}: {self.message}"

    @property
    def errors(self) -> tuple["SettingError", ...]:
        """This one, where several may have been collected."""
        return (self,)


class SettingErrors(ValueError):
    """Several SettingErrors, to be reported together."""

    def __init__(self, errors: Sequence[SettingError]) -> None:
        super().__init__(errors)
        self.errors = tuple(errors)

    def __str__(self) -> str:
        return "\n".join(map(str, self.errors))


@contextlib.contextmanager
def errors_for(key: str) -> Iterator[None]:
    """Turns a ValueError or OSError inside into a SettingError of `key`, unless it has a key."""
    try:
        yield
    except (SettingError, SettingErrors, ConfigError):
        raise
    except (ValueError, OSError) as error:
        raise SettingError(key, str(error)) from error


class Collector:
    """Collects the SettingErrors of several checks."""

    def __init__(self) -> None:
        self.errors: list[SettingError] = []

    @contextlib.contextmanager
    def checking(self, key: str = "") -> Iterator[None]:
        """Keeps the SettingErrors inside; with a key, also other errors, as `about` makes them."""
        try:
            with errors_for(key) if key else contextlib.nullcontext():
                yield
        except (SettingError, SettingErrors) as error:
            self.errors += error.errors


@contextlib.contextmanager
def collecting() -> Iterator[Collector]:
    """Raises at its end, all together, what was collected."""
    collector = Collector()
    yield collector
    if collector.errors:
        raise SettingErrors(collector.errors)


def keys() -> list[str]:
    """Every section.key, those of plugins included."""
    return [f"{section}.{key}" for section, fields in FIELDS.items() for key in fields]


def nearest(name: str, candidates: Iterable[str], limit: int = 1) -> list[str]:
    """The candidates spelt most like `name`, best first; case and dashes are ignored."""
    spellings: dict[str, str] = {}
    for candidate in candidates:
        spellings.setdefault(candidate.lower(), candidate)
    cutoff = 0.5 if len(name) <= 3 else 0.6
    word = name.lower().replace("-", "_")
    return [
        spellings[match]
        for match in difflib.get_close_matches(word, spellings, n=limit, cutoff=cutoff)
    ]


def did_you_mean(names: Sequence[str]) -> str:
    """'; did you mean "a" or "b"?', or nothing when there is no name to offer."""
    return f"; did you mean {one_of([quote(name) for name in names])}?" if names else ""


def near_file(path: Path, pattern: str = "*") -> str:
    """'; did you mean "a"?' for a file that does not exist, or ', and no folder "b"'."""
    if not os.path.isdir(path.parent):  # noqa: PTH112  (False for a name that is too long for a folder)
        return f", and no folder {quote(str(path.parent))}"
    # By stem: a common suffix makes no two names alike. Of one stem, the right suffix comes first.
    files = sorted(path.parent.glob(pattern), key=lambda file: (file.suffix != path.suffix, file))
    by_stem: dict[str, Path] = {}
    for file in files:
        by_stem.setdefault(file.stem, file)
    return did_you_mean([str(by_stem[stem]) for stem in nearest(path.stem, by_stem)])


def how_to_fetch(given: str, key: str) -> str:
    """'; names on the Hugging Face hub are not fetched ...' for what may be one, or an address.

    key: that means a path, or an argument of the command line.
    """
    match = _HUB_NAME.fullmatch(given)
    name = match["name"] if match else ""
    then = f'set {key} = "DIR"' if "." in key else f"name DIR as {key}"
    # A name of a file, or of one in a folder that is there, is a path that was misspelt.
    if not name or len(name) > 96 or _SUFFIX.search(name) or os.path.isdir(name.partition("/")[0]):  # noqa: PTH112
        return f"; addresses are not fetched: download to DIR, and {then}" * ("://" in given)
    option = ""
    if key.endswith("dataset_path"):
        option = " --repo-type dataset"
        then += f", or set {key.removesuffix('_path')} = {quote(name)} to stream it"
    elif key == "checkpoint.initial_load_path":
        then = 'set checkpoint.initial_load_hf = "DIR"'
    return (
        "; names on the Hugging Face hub are not fetched: run "
        f"hf download {name}{option} --local-dir DIR, and {then}"
    )


def one_of(words: Sequence[str]) -> str:
    """Words as an English alternative: a, b or c."""
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def quote(text: str) -> str:
    """A TOML basic string."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def literal(value: Any) -> str:
    """A value as TOML writes it; a table is only named."""
    match value:
        case str():
            return quote(value)
        case bool():
            return str(value).lower()
        case list() | tuple():
            return f"[{', '.join(map(literal, value))}]"
        case dict():
            return "a table"
        case date() | time():
            return value.isoformat()
        case _:
            return repr(value)


def unknown_table(name: str, content: Any) -> str:
    """Why a top-level name is wrong."""
    if not isinstance(content, dict):
        homes = [f"{section}.{name}" for section, fields in FIELDS.items() if name in fields]
        names = (homes or nearest(name, keys()))[:3]
        return f"a key outside of any table{did_you_mean(names)}"
    if names := nearest(name, FIELDS):
        return f"unknown table{did_you_mean(names)}"
    names = [s for s, fields in FIELDS.items() if content and content.keys() <= fields.keys()][:3]
    hint = did_you_mean(names) or f"; the tables are {', '.join(FIELDS)}"
    return f"unknown table{hint}"


def unknown_key(section: str, key: str) -> str:
    """Why a key of a known table is wrong."""
    if key == "extends":
        return "extends must be at the top of a file, before the first [table]"
    elsewhere = [f"{other}.{key}" for other, fields in FIELDS.items() if key in fields]
    same = [f"{section}.{match}" for match in nearest(key, FIELDS[section], limit=3)]
    if names := elsewhere[:3] or same:
        return f"unknown key{did_you_mean(names)}"
    other_keys = {key: f"{other}.{key}" for other, fields in FIELDS.items() for key in fields}
    if names := [other_keys[match] for match in nearest(key, other_keys)]:
        return f"unknown key{did_you_mean(names)}"
    return f"unknown key; [{section}] has {', '.join(FIELDS[section])}"


def foreign_key(section: str, key: str, tag: str) -> str:
    """The problem of a key that belongs to other variants of its table than that of this tag."""
    (need,) = [need for need in FIELDS[section][key].metadata if isinstance(need, Variant)]
    return (
        f"does not apply where {section}.{need.keys[0]} is {quote(tag)}: set "
        f"{need.stated(section)}, or remove {key}"
    )


def rows_of(field: FieldInfo) -> type[Section] | None:
    """The section of each row, where a key is a list of tables."""
    (row, *_) = get_args(field.annotation) or (None,)
    # Python 3.10 takes list[str] for a type.
    is_class = isinstance(row, type) and get_origin(row) is None
    return row if is_class and issubclass(row, Section) else None


def wrong_value(section: str, key: str, value: Any) -> str:
    """The expected values of a key, the value it got, and the nearest choice of a misspelt word."""
    field = FIELDS[section][key]
    got = literal(value)
    got = got if len(got) <= 80 else f"{got[:77]}..."
    message = f"expected {expected(field)}, got {got}"
    choices = _choices(field.annotation, field.metadata)
    choices = [choice for choice in choices if isinstance(choice, str)]
    words = value if isinstance(value, list) else [value]
    wrong = [word for word in words if isinstance(word, str) and word not in choices]
    return message + did_you_mean(nearest(wrong[0], choices) if wrong else [])


def wrong_row(
    key: str, row: type[Section], value: Any, place: Sequence[int | str], kind: str
) -> str:
    """The problem at a place inside the tables of a key, such as data.sources."""
    fields = row.model_fields
    match place:
        case [int(index), str(key), *_]:
            entry, names = f"table {index + 1}", list(fields)
            if kind == "missing":
                return f"{entry}: {key} is missing"
            if kind == "extra_forbidden":
                hint = did_you_mean(nearest(key, names)) or f"; it has {', '.join(names)}"
                return f"{entry}: unknown key {key}{hint}"
            got = literal(value[index][key])
            return f"{entry}: {key}: expected {expected(fields[key])}, got {got}"
        case _:
            return f"expected tables, as [[{key}]] makes them, got {literal(value)}"


def expected(field: FieldInfo) -> str:
    """A field's types and bounds in words, e.g. 'an integer greater than 0 or "latest"'."""
    return one_of(_alternatives(field.annotation, field.metadata))


def _alternatives(annotation: Any, metadata: Sequence[Any] = ()) -> list[str]:
    origin = get_origin(annotation)
    if choices := _choices(annotation, metadata) if origin is Literal or annotation is str else []:
        return [literal(choice) for choice in choices]
    if origin in (Union, types.UnionType):
        options = [option for option in get_args(annotation) if option is not types.NoneType]
        return [words for option in options for words in _alternatives(option)]
    if origin is list:
        return [f"a list of {one_of(_alternatives(get_args(annotation)[0]))}"]
    if hasattr(annotation, "__metadata__"):
        return _alternatives(annotation.__origin__, _bounds(annotation.__metadata__))
    noun = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}
    return [" ".join(filter(None, [noun[annotation], _bound_words(metadata)]))]


def _bounds(metadata: Sequence[Any]) -> list[Any]:
    return [
        b for item in metadata for b in (item.metadata if isinstance(item, FieldInfo) else [item])
    ]


def _bound_words(bounds: Sequence[Any]) -> str:
    values = {name: getattr(b, name) for b in bounds for name in BOUNDS if hasattr(b, name)}
    if values.keys() == {"ge", "le"}:
        return f"from {values['ge']} to {values['le']}"
    return " and ".join(f"{BOUNDS[name]} {bound}" for name, bound in values.items())


def _choices(annotation: Any, metadata: Sequence[Any] = ()) -> list[Any]:
    """The values of Literals and registries in a type."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    if hasattr(annotation, "__metadata__"):
        return _choices(annotation.__origin__, annotation.__metadata__)
    names = [name for item in metadata if isinstance(item, Registry) for name in item]
    return names + [choice for inner in get_args(annotation) for choice in _choices(inner)]
