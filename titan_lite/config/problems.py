"""The wording of configuration errors: problems, the block that lists them, and similar names."""

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
BOUNDS = {"gt": "greater than", "ge": "of at least", "lt": "less than", "le": "at most"}
_HUB_NAME = re.compile(
    r"(?:(?:https?://)?(?:huggingface\.co|hf\.co)/|hf://)?(?:datasets/|models/)?"
    r"(?P<name>[a-zA-Z0-9][\w.-]*(?:/[\w.-]+)?)(?:@[\w.-]+)?(?:/(?:tree|blob|resolve)/.*)?/?",
    re.ASCII,
)
_SUFFIX = re.compile(r"\.[a-z]+\d?$")


@dataclass(frozen=True)
class Problem:
    """One error of a configuration. key: empty if the error concerns the whole source."""

    key: str
    source: str
    message: str


class ConfigError(ValueError):
    """All problems of a configuration; its text is the block that a user reads."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(dict.fromkeys(problems))
        super().__init__(self._block())

    def __reduce__(self) -> Any:
        # Pickle passes only an exception's arguments, which is the text here.
        return type(self), (self.problems,)

    def _block(self) -> str:
        count = len(self.problems)
        # A long key, such as a malformed override, must not widen the column of all others.
        keys = [p.key if p.key.isprintable() else quote(p.key) for p in self.problems]
        width = max((len(key) for key in keys if len(key) <= 40), default=0)
        lines = [f"titan-lite: {count} problem{'s' * (count != 1)} in the configuration"]
        for p, key in zip(self.problems, keys, strict=True):
            where = f"{key:<{width}} ({p.source})" if key else p.source
            lines.append(f"  {where}: {p.message}")
        return "\n".join(lines)


class SettingError(ValueError):
    """A wrong setting, raised where its key is known.

    keys: one or several keys, whose values contradict each other. Of several, the one that was set
    last is reported: that of the latest layer, and in a layer the last in `keys`. If none was set,
    the first is reported.
    """

    def __init__(self, keys: str | Sequence[str], message: str) -> None:
        super().__init__(keys, message)
        self.keys = (keys,) if isinstance(keys, str) else tuple(keys)
        self.message = message

    def __str__(self) -> str:
        return f"{self.keys[0]}: {self.message}"

    @property
    def errors(self) -> tuple["SettingError", ...]:
        """This error, as the only element; SettingErrors has several."""
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
    """Converts a ValueError or OSError to a SettingError of `key`, unless it has a key."""
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
        """Collects SettingErrors in its context; with a key, also ValueErrors and OSErrors."""
        try:
            with errors_for(key) if key else contextlib.nullcontext():
                yield
        except (SettingError, SettingErrors) as error:
            self.errors += error.errors


@contextlib.contextmanager
def collecting() -> Iterator[Collector]:
    """Raises all collected errors together when its context ends."""
    collector = Collector()
    yield collector
    if collector.errors:
        raise SettingErrors(collector.errors)


def keys() -> list[str]:
    """Every section.key, including those of plugins."""
    return [f"{section}.{key}" for section, fields in FIELDS.items() for key in fields]


def nearest(name: str, candidates: Iterable[str], limit: int = 1) -> list[str]:
    """Returns the candidates with the nearest spelling, best first, ignoring case and dashes."""
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
    """Returns '; did you mean "a" or "b"?', or "" without names."""
    return f"; did you mean {one_of([quote(name) for name in names])}?" if names else ""


def near_file(path: Path, pattern: str = "*") -> str:
    """Returns '; did you mean "a"?' for a missing file, or ', and no folder "b"'."""
    if not os.path.isdir(path.parent):  # noqa: PTH112  (False for a name that is too long for a folder)
        return f", and no folder {quote(str(path.parent))}"
    # Compares stems, because a common suffix does not make names similar. For equal stems, the
    # right suffix comes first.
    files = sorted(path.parent.glob(pattern), key=lambda file: (file.suffix != path.suffix, file))
    by_stem: dict[str, Path] = {}
    for file in files:
        by_stem.setdefault(file.stem, file)
    return did_you_mean([str(by_stem[stem]) for stem in nearest(path.stem, by_stem)])


def how_to_fetch(given: str, key: str) -> str:
    """Returns a hint if the path may be an address, or a name on the Hugging Face hub; else "".

    key: the key or argument that must be a path.
    """
    match = _HUB_NAME.fullmatch(given)
    name = match["name"] if match else ""
    then = f'set {key} = "DIR"' if "." in key else f"name DIR as {key}"
    # With a file's suffix, or in an existing folder, it is a misspelt path.
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


def brace_hint(given: str) -> str:
    """'; {a,b} is not expanded ...' for a path with alternatives as shells expand them."""
    is_given = re.search(r"\{[^{}]*,[^{}]*\}", given)
    return "; {a,b} is not expanded: use *, ? or [ab], or [[data.sources]]" if is_given else ""


def one_of(words: Sequence[str]) -> str:
    """Joins words as an alternative: a, b or c."""
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def first_few(words: Sequence[str], most: int) -> str:
    """Joins the first words as a list, with the number of the others: a, b and 3 more."""
    more = f" and {len(words) - most:,} more" if len(words) > most else ""
    return ", ".join(words[:most]) + more


def quote(text: str) -> str:
    """Formats a text as a TOML basic string."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def literal(value: Any) -> str:
    """Formats a value as TOML; a table becomes "a table"."""
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
    """Returns the problem of an unknown top-level name."""
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
    """Returns the problem of an unknown key in a known table."""
    if key == "extends":
        return "extends must be at the top of a file, before the first [table]"
    elsewhere = [f"{other}.{key}" for other, fields in FIELDS.items() if key in fields]
    same = [f"{section}.{match}" for match in nearest(key, FIELDS[section], limit=3)]
    others = {key: f"{other}.{key}" for other, fields in FIELDS.items() for key in fields}
    near = [others[match] for match in nearest(key, others)]
    if names := elsewhere[:3] or same or near:
        return f"unknown key{did_you_mean(names)}"
    return f"unknown key; [{section}] has {', '.join(FIELDS[section])}"


def foreign_key(section: str, key: str, tag: str) -> str:
    """Returns the problem of a key that the table's variant with this tag does not have."""
    (need,) = [need for need in FIELDS[section][key].metadata if isinstance(need, Variant)]
    return (
        f"does not apply where {section}.{need.keys[0]} is {quote(tag)}: set "
        f"{need.stated(section)}, or remove {key}"
    )


def rows_of(field: FieldInfo) -> type[Section] | None:
    """Returns the section of each row if a key is a list of tables, else None."""
    (row, *_) = get_args(field.annotation) or (None,)
    # In Python 3.10, list[str] is an instance of type.
    is_class = isinstance(row, type) and get_origin(row) is None
    return row if is_class and issubclass(row, Section) else None


def wrong_value(field: FieldInfo, value: Any) -> str:
    """Returns the problem of a wrong value: expected values, the value, and the nearest choice."""
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
    """Returns the problem at a place inside a list of tables, such as data.sources."""
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
            return (
                f"expected an array of tables, each with the head [[{key}]], got {literal(value)}"
            )


def expected(field: FieldInfo) -> str:
    """Returns a field's types and bounds in words: '"latest" or an integer of at least 0'."""
    return one_of(_alternatives(field.annotation, field.metadata))


def _alternatives(annotation: Any, metadata: Sequence[Any] = ()) -> list[str]:
    origin = get_origin(annotation)
    if choices := _choices(annotation, metadata) if origin is Literal or annotation is str else []:
        return [literal(choice) for choice in choices]
    if origin in (Union, types.UnionType):
        options = [option for option in get_args(annotation) if option is not types.NoneType]
        # Bounds refer to the word before them, so a number is the last alternative.
        options.sort(key=lambda option: not _choices(option))
        return [words for option in options for words in _alternatives(option)]
    if origin is list:
        return [_list_words(get_args(annotation)[0], metadata)]
    if hasattr(annotation, "__metadata__"):
        return _alternatives(annotation.__origin__, _bounds(annotation.__metadata__))
    is_filled = any(hasattr(bound, "min_length") for bound in metadata)
    text = "a non-empty string" if is_filled else "a string"
    noun = {int: "an integer", float: "a number", str: text, bool: "true or false"}
    return [" ".join(filter(None, [noun[annotation], _bound_words(metadata)]))]


def _list_words(item: Any, metadata: Sequence[Any]) -> str:
    """Returns 'a list of strings' or 'a list with any of "a" or "b"', with the least length."""
    least = next((bound.min_length for bound in metadata if hasattr(bound, "min_length")), 0)
    words = one_of(_alternatives(item))
    if words.startswith('"'):
        return f"a list with {'at least one' if least else 'any'} of {words}"
    plural = re.sub(r"^an? (\w+)", r"\1s", words)
    return f"a list of {least} {plural}" if least else f"a list of {plural}"


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
    """Returns the values of Literals and registries in a type."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    if hasattr(annotation, "__metadata__"):
        return _choices(annotation.__origin__, annotation.__metadata__)
    names = [name for item in metadata if isinstance(item, Registry) for name in item]
    return names + [choice for inner in get_args(annotation) for choice in _choices(inner)]
