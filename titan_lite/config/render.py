"""Writes a configuration as TOML with the origin of each value, its JSON schema, and its manual."""

from collections.abc import Mapping, Sequence
from itertools import chain
from textwrap import TextWrapper
from typing import Any

from pydantic.fields import FieldInfo

from titan_lite.config.load import LoadedConfig
from titan_lite.config.needs import Variant, needs_of
from titan_lite.config.problems import FIELDS, SECTIONS, expected, literal, rows_of
from titan_lite.config.registry import Registry
from titan_lite.config.schema import TAGGED, Config
from titan_lite.config.stored import words

# The newest draft that TOML language servers (Taplo, Even Better TOML) support.
HEAD = """\
# Configuration

Every key, as printed by `titan-lite config --docs`. If a condition after *Needs* is not met, the
key has no effect, and setting it causes a warning. If a condition after *Requires* is not met,
setting the key is an error."""
SCHEMA_DRAFT = "http://json-schema.org/draft-07/schema#"


def to_toml(
    loaded: LoadedConfig, resolved: Mapping[str, Any] | None = None, num_params: str | None = None
) -> str:
    """Formats every key with its value and, as a comment, its origin; loads to the same values.

    resolved: values of the keys in [model] that the flavor sets, which become comments.
    num_params: number of parameters in words, for another comment.
    """
    rows: list[tuple[str, str]] = []
    for section, fields in FIELDS.items():
        rows.append((f"\n[{section}]" if rows else f"[{section}]", ""))
        for key in fields:
            needs = needs_of(SECTIONS[section], key, fields[key])
            variants = [need for need in needs if isinstance(need, Variant)]
            if other := [need for need in variants if not need.holds(loaded.config, section)]:
                rows.append((f"# {key} is not set", f"requires {other[0].stated(section)}"))
                continue
            value = getattr(getattr(loaded.config, section), key)
            if rows_of(fields[key]):
                tables = [words(row.model_dump(exclude_none=True)) for row in value]
                line = f"{key} = [{', '.join(tables)}]"
            elif value is not None:
                line = f"{key} = {literal(value)}"
            elif section == "model" and resolved and key in resolved:
                rows.append((f"# {key} = {literal(resolved[key])}", loaded.config.model.flavor))
                continue
            else:
                line = f"# {key} is not set"
            rows.append((line, loaded.origins[f"{section}.{key}"]))
        if section == "model" and num_params is not None:
            rows.append((f"# parameters: {num_params}", ""))
    # Long values must not move the comments of all other lines.
    width = max(len(line) for line, _ in rows if len(line) <= 50)
    return "\n".join(f"{line:<{width}}  # {origin}" if origin else line for line, origin in rows)


def json_schema(flavors: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Returns the schema of a TOML file for editors: sections inlined, no null (TOML has none).

    flavors: names by model family. Plugins, also those of a base file, may add others.
    """
    properties: dict[str, Any] = {
        "extends": {
            "type": "string",
            "description": "A TOML file, relative to this one, whose values this one inherits.",
        }
    }
    offered: dict[str, dict[str, list[str]]] = {}
    for name, fields in FIELDS.items():
        table = TAGGED.get(name) or SECTIONS[name]
        properties[name] = _table_schema(table.model_json_schema())
        for key, field in fields.items():
            if row := rows_of(field):
                items = _table_schema(row.model_json_schema())
                properties[name]["properties"][key]["items"] = items
            for registry in (item for item in field.metadata if isinstance(item, Registry)):
                offered.setdefault(name, {})[key] = list(registry)
        _state_needs(name, properties[name])
    all_flavors = sorted({*chain.from_iterable(flavors.values())})
    offered["model"] = {"name": list(flavors), "flavor": all_flavors}
    for name, keys in offered.items():
        for key, names in keys.items():
            # Makes an editor suggest names, without rejecting others.
            del properties[name]["properties"][key]["type"]
            properties[name]["properties"][key]["anyOf"] = [{"enum": names}, {"type": "string"}]
    has_plugins = {"required": ["job"], "properties": {"job": {"required": ["plugins"]}}}
    known: dict[str, dict[str, Any]] = {
        name: {"properties": {key: {"enum": names} for key, names in keys.items()}}
        for name, keys in offered.items()
    }
    known["model"]["allOf"] = [
        {
            "if": {"required": ["name"], "properties": {"name": {"const": family}}},
            "then": {"properties": {"flavor": {"enum": list(names)}}},
        }
        for family, names in flavors.items()
    ]
    return {
        "$schema": SCHEMA_DRAFT,
        **_table_schema(Config.model_json_schema()),
        "properties": properties,
        "if": {"not": {"anyOf": [{"required": ["extends"]}, has_plugins]}},
        "then": {"properties": known},
    }


def _table_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """Returns the schema of a table without null and without definitions of other tables."""
    schema.pop("$defs", None)
    fields = schema["properties"].items()
    return schema | {"properties": {key: _without_null(field) for key, field in fields}}


def to_markdown() -> str:
    """Returns a page on every key: possible values, default, description and conditions."""
    wrap = TextWrapper(
        120, "- ", subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )
    lines = [HEAD]
    for table, fields in FIELDS.items():
        lines += ["", f"## [{table}]", ""]
        for key, field in fields.items():
            lines.append(wrap.fill(_described(key, field) + _needs_in_words(table, key)))
        for key, field in fields.items():
            if row := rows_of(field):
                lines += ["", f"## [[{table}.{key}]]", ""]
                lines += [wrap.fill(_described(*item)) for item in row.model_fields.items()]
    return "\n".join(lines)


def _described(key: str, field: FieldInfo) -> str:
    values = "tables" if rows_of(field) else expected(field)
    default = "not set" if field.default is None else f"`{literal(field.default)}`"
    required = field.is_required()
    return f"`{key}`: {values}; {'required' if required else f'default {default}'}. " + (
        field.description or ""
    )


def _needs_in_words(table: str, key: str) -> str:
    needs = needs_of(SECTIONS[table], key, FIELDS[table][key])
    words = ""
    for verb, is_variant in (("Requires", True), ("Needs", False)):
        stated = [need.stated(table) for need in needs if isinstance(need, Variant) == is_variant]
        words += f" {verb} {' and '.join(stated)}." if stated else ""
    return words


def _state_needs(table: str, schema: dict[str, Any]) -> None:
    """Adds the conditions of keys to a table's schema, and rejects keys of other variants."""
    for key, field in schema["properties"].items():
        field["description"] += _needs_in_words(table, key)
        for need in needs_of(SECTIONS[table], key, FIELDS[table][key]):
            if isinstance(need, Variant):
                (tag,) = need.keys
                rule = {
                    # A base file may choose another variant.
                    "if": {"required": [key, tag]},
                    "then": {"properties": {tag: {"enum": list(need.values)}}},
                }
                schema.setdefault("allOf", []).append(rule)


def _without_null(field: dict[str, Any]) -> dict[str, Any]:
    options = field.get("anyOf", [])
    kept = [option for option in options if option != {"type": "null"}]
    if len(kept) == len(options):
        return field
    rest = {key: value for key, value in field.items() if key not in ("anyOf", "default")}
    return rest | (kept[0] if len(kept) == 1 else {"anyOf": kept})
