"""Loads TOML files and overrides into a frozen Config, and records the origin of each value."""

import contextlib
import os
import re
import stat
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from titan_lite.config.plugins import import_plugins
from titan_lite.config.problems import (
    FIELDS,
    ConfigError,
    Problem,
    SettingError,
    SettingErrors,
    did_you_mean,
    foreign_key,
    keys,
    literal,
    near_file,
    nearest,
    quote,
    rows_of,
    unknown_key,
    unknown_table,
    wrong_row,
    wrong_value,
)
from titan_lite.config.schema import TAGGED, Config

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["ConfigError", "LoadedConfig", "Problem", "load_config"]

COMMAND_LINE = "command line"
DEFAULT = "default"
Tables = dict[str, Any]


@dataclass(frozen=True)
class LoadedConfig:
    """A valid Config; origins maps each dotted key to "default", a file or "command line".

    layers: the origins in the order in which they were read; later ones replace earlier.
    """

    config: Config
    origins: dict[str, str]
    layers: tuple[str, ...] = (DEFAULT, COMMAND_LINE)

    @contextlib.contextmanager
    def reporting(self) -> Iterator[None]:
        """Converts SettingErrors to the ConfigError that a user reads."""
        try:
            yield
        except (SettingError, SettingErrors) as error:
            raise ConfigError(map(self._problem, error.errors)) from error

    def _problem(self, error: SettingError) -> Problem:
        given = [key for key in error.keys if self.origin(key) != DEFAULT] or error.keys[:1]
        # The first of the largest, which is the last in error.keys.
        key = max(reversed(given), key=lambda key: self.layers.index(self.origin(key)))
        return Problem(key, self.origin(key), error.message)

    def origin(self, key: str) -> str:
        """The origin of a value; keys of a source (data.sources.NAME.split) share its origin."""
        return self.origins[".".join(key.split(".")[:2])]


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> LoadedConfig:
    """Loads defaults < TOML file (its `extends` first) < overrides; later values replace earlier.

    An override is `--section.key=value`. The value is parsed as TOML, or else taken as a string.
    Raises ConfigError with all problems of all layers, including those of overridden values.
    """
    problems: list[Problem] = []
    layers = [] if path is None else _read_layers(os.fspath(path), [], problems)
    for override in overrides:
        if tables := _parse_override(override, problems):
            layers.append((COMMAND_LINE, tables))
    for source, modules in _plugins(layers):
        try:
            import_plugins(modules)
        except SettingError as error:
            # Ends here, because names that the plugin would register are unknown now.
            raise ConfigError([*problems, Problem("job.plugins", source, error.message)]) from error
    tags = _choose_variants(layers)
    for source, tables in layers:
        problems += _problems_of(source, tables, tags)
    if problems:
        raise ConfigError(problems)

    merged: dict[str, dict[str, Any]] = {section: {} for section in FIELDS}
    origins = dict.fromkeys(keys(), DEFAULT)
    for source, tables in layers:
        for section, table in tables.items():
            merged[section] |= table
            origins.update({f"{section}.{key}": source for key in table})
    order = (DEFAULT, *(source for source, _ in layers))
    return LoadedConfig(Config.model_validate(merged), origins, order)


def _plugins(layers: Sequence[tuple[str, Tables]]) -> list[tuple[str, list[str]]]:
    """Returns job.plugins of the last layer that has it, with its source; [] for a wrong type."""
    given = [
        (source, job["plugins"])
        for source, tables in layers
        if isinstance(job := tables.get("job"), dict) and "plugins" in job
    ]
    return [
        (source, modules)
        for source, modules in given[-1:]
        if isinstance(modules, list) and all(isinstance(module, str) for module in modules)
    ]


def _read_layers(name: str, chain: list[str], problems: list[Problem]) -> list[tuple[str, Tables]]:
    """Returns the file's layers, after those that it extends. chain: the files that extend it."""
    tables = _read_toml(name, chain, problems)
    if tables is None:
        return []
    base = tables.pop("extends", None)
    if base is None:
        return [(name, tables)]
    if not isinstance(base, str):
        message = f"expected the name of a TOML file, got {literal(base)}"
        problems.append(Problem("extends", name, message))
        return [(name, tables)]
    base_name = os.path.normpath(Path(name).parent / base)
    chain = [*chain, name]
    if base_name in map(os.path.normpath, chain):
        message = f"the files extend each other in a circle: {' -> '.join([*chain, base_name])}"
        problems.append(Problem("extends", name, message))
        return [(name, tables)]
    return [*_read_layers(base_name, chain, problems), (name, tables)]


def _read_toml(name: str, chain: list[str], problems: list[Problem]) -> Tables | None:
    """Returns the tables of a TOML file; None, with a problem of the file that names it."""
    path = Path(name)
    try:
        # A pipe can be read only once, and opening one may wait forever.
        if stat.S_IFMT(path.stat().st_mode) not in (stat.S_IFREG, stat.S_IFDIR):
            raise ValueError("it must be a regular file, because several processes read it")
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        byte = error.object[error.start]
        problems.append(Problem("", name, f"not UTF-8 text: byte 0x{byte:02x} in line {line}"))
        return None
    except (OSError, ValueError) as error:
        reason = _unreadable(path, error)
        if chain:
            problems.append(Problem("extends", chain[-1], f"base file {quote(name)}: {reason}"))
        else:
            problems.append(Problem("", name, reason))
        return None
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        problems.append(Problem("", name, f"not valid TOML: {error}{_line_at_fault(text, error)}"))
        return None


def _unreadable(path: Path, error: OSError | ValueError) -> str:
    if isinstance(error, IsADirectoryError):
        files = sorted(file.name for file in path.glob("*.toml"))
        held = f"; it holds {', '.join(files[:8])}" if files else ""
        return f"a folder, where a TOML file is expected{held}"
    if not isinstance(error, FileNotFoundError):
        return f"cannot be read: {getattr(error, 'strerror', None) or error}"
    return f"no such file{near_file(path, '*.toml')}"


def _line_at_fault(text: str, error: BaseException) -> str:
    """Returns the line with the error, with a hint if a string lacks quotes."""
    if (match := re.search(r"at line (\d+)", str(error))) is None:
        return ""
    line = text.splitlines()[int(match[1]) - 1 : int(match[1])]
    if not line:
        return ""
    bare = re.fullmatch(r"\s*[\w-]+\s*=\s*([A-Za-z_][^\s\"'#]*)\s*(#.*)?", line[0])
    hint = f"; write a string in quotes: {quote(bare[1])}" if bare else ""
    return f": {line[0].strip()}{hint}"


def _parse_override(override: str, problems: list[Problem]) -> Tables | None:
    """Parses `--section.key=value` to tables; returns None, with a problem, if it is wrong."""
    key, equals, text = override.removeprefix("--").partition("=")
    section, dot, name = key.partition(".")
    if not (override.startswith("--") and equals and dot and section and name):
        shape = "expected --section.key=value"
        if key in FIELDS:
            message = f"{shape}; the table {key} cannot be overridden as a whole"
            problems.append(Problem(override, COMMAND_LINE, message))
            return None
        known_keys = keys()
        names = [key] if key in known_keys else nearest(key, known_keys)
        if not dot:
            names = [known for known in known_keys if known.endswith(f".{key}")] or names
        missing = "; the value is missing" if key in known_keys and not equals else ""
        hint = missing or did_you_mean([f"--{n}=" for n in names[:3]])
        is_option = override.startswith("--") and not dot and not hint
        message = f"not an option; {shape}" if is_option else f"{shape}{hint}"
        problems.append(Problem(override, COMMAND_LINE, message))
        return None
    return {section: {name: _parse_value(text)}}


def _parse_value(text: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return parsed["value"] if parsed.keys() == {"value"} else text


def _choose_variants(layers: Sequence[tuple[str, Tables]]) -> Tables:
    """Returns the tag of each tagged table; the last layer that sets it counts.

    Removes keys of other variants from earlier layers.
    """
    tags = {name: table.fields[table.tag].default for name, table in TAGGED.items()}
    for name, table in TAGGED.items():
        given = [(s, keys) for s, tables in layers if isinstance(keys := tables.get(name), dict)]
        chosen = [
            (source, tag)
            for source, keys in given
            if table.tag in keys and (tag := table.tag_of(keys))
        ]
        if chosen:
            last, tags[name] = chosen[-1]
            # All overrides count as one layer, whatever their order.
            first = [source for source, _ in given].index(last)
            for _, keys in given[:first]:
                for key in table.foreign_keys(tags[name]) & keys.keys():
                    del keys[key]
    return tags


def _problems_of(source: str, tables: Tables, tags: Mapping[str, str]) -> Iterator[Problem]:
    """Yields the problems of a layer, worded by problems.py, not by pydantic.

    tags: the tag of each tagged table, from all layers.
    """
    tagged = {
        name: tables[name] | {TAGGED[name].tag: tag}
        for name, tag in tags.items()
        if TAGGED[name].tag_of(tables.get(name)) is not None
    }
    places: dict[tuple[str, ...], tuple[str, tuple[int | str, ...]]] = {}
    try:
        Config.model_validate(tables | tagged)
    except ValidationError as error:
        # A union reports one error per alternative: keep the first.
        for details in error.errors(include_url=False, include_context=False):
            place = tuple(str(part) for part in details["loc"][:2])
            # A misspelt key of a source explains the missing one.
            if place not in places or details["type"] == "extra_forbidden":
                places[place] = details["type"], details["loc"][2:]
    for (section, *key), (kind, inside) in places.items():
        content, fields = tables[section], FIELDS.get(section, {})
        if section in TAGGED:
            fields = TAGGED[section].fields_of(tags[section])
        if not key and section in FIELDS:
            message = f"expected a table, got {literal(content)}"
        elif not key:
            message = unknown_table(section, content)
        elif kind == "extra_forbidden" and key[0] in FIELDS[section] and not inside:
            message = foreign_key(section, key[0], tags[section])
        elif key[0] in fields and (row := rows_of(fields[key[0]])):
            message = wrong_row(f"{section}.{key[0]}", row, content[key[0]], inside, kind)
        elif kind == "extra_forbidden":
            message = unknown_key(section, key[0])
        else:
            message = wrong_value(fields[key[0]], content[key[0]])
        yield Problem(".".join([section, *key]), source, message)
