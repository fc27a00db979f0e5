"""A configuration written out: as TOML with the origin of each value, and as a JSON schema."""

from typing import Any

from titan_lite.config.load import LoadedConfig
from titan_lite.config.problems import FIELDS, SOURCES, literal
from titan_lite.config.schema import Config

# The newest draft that the TOML language servers (Taplo, Even Better TOML) read.
SCHEMA_DRAFT = "http://json-schema.org/draft-07/schema#"


def to_toml(loaded: LoadedConfig) -> str:
    """Every key with its value and, as an aligned comment, its origin; loads back to the same."""
    rows: list[tuple[str, str]] = []
    for section, fields in FIELDS.items():
        rows.append((f"\n[{section}]" if rows else f"[{section}]", ""))
        for key in fields:
            value = getattr(getattr(loaded.config, section), key)
            if fields[key] is SOURCES:
                line = f"{key} = {_inline([source.model_dump() for source in value])}"
            else:
                line = f"# {key} is not set" if value is None else f"{key} = {literal(value)}"
            rows.append((line, loaded.origins[f"{section}.{key}"]))
    # A long value pushes its own comment, not everybody's.
    width = max(len(line) for line, _ in rows if len(line) <= 50)
    return "\n".join(f"{line:<{width}}  # {origin}" if origin else line for line, origin in rows)


def _inline(tables: list[dict[str, Any]]) -> str:
    rows = (", ".join(f"{k} = {literal(v)}" for k, v in table.items()) for table in tables)
    return f"[{', '.join(f'{{{row}}}' for row in rows)}]"


def json_schema() -> dict[str, Any]:
    """The schema of a TOML file, for editors: sections inlined, no null (TOML has none)."""
    schema = Config.model_json_schema()
    sections = schema.pop("$defs")
    properties: dict[str, Any] = {
        "extends": {
            "type": "string",
            "description": "A TOML file, relative to this one, whose values this one inherits.",
        }
    }
    for name, reference in schema["properties"].items():
        section = sections[reference["$ref"].rpartition("/")[2]]
        section["properties"] = {
            key: _without_null(field) for key, field in section["properties"].items()
        }
        properties[name] = section
    properties["data"]["properties"]["sources"]["items"] = sections["DataSource"]
    return {"$schema": SCHEMA_DRAFT, **schema, "properties": properties}


def _without_null(field: dict[str, Any]) -> dict[str, Any]:
    options = field.get("anyOf", [])
    kept = [option for option in options if option != {"type": "null"}]
    if len(kept) == len(options):
        return field
    rest = {key: value for key, value in field.items() if key not in ("anyOf", "default")}
    return rest | (kept[0] if len(kept) == 1 else {"anyOf": kept})
