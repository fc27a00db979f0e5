"""Tables whose keys depend on the value of one key, the tag: each value has a section."""

from collections.abc import Mapping
from copy import copy
from typing import Any, Generic, Literal, TypeVar

from pydantic.fields import FieldInfo

from titan_lite.config.needs import Variant
from titan_lite.config.section import Section

S = TypeVar("S", bound=Section)


class TaggedTable(Generic[S]):
    """Variants of the section `base`, by their default of the key `tag`; the first is the default.

    fields: the keys of all variants; a key that only some variants have gets a condition.
    """

    def __init__(self, tag: str, base: type[S]) -> None:
        self.tag, self.base = tag, base
        self.variants: dict[str, type[S]] = {}
        self.fields: dict[str, FieldInfo] = {}

    def add(self, variant: type[S]) -> None:
        """Adds a variant."""
        self.variants[variant.model_fields[self.tag].default] = variant
        fields = dict(self.base.model_fields)
        for section in self.variants.values():
            fields |= {k: v for k, v in section.model_fields.items() if k not in fields}
        # In place, because FIELDS refers to it.
        self.fields.clear()
        self.fields.update({key: self._merged(key, field) for key, field in fields.items()})

    def _merged(self, key: str, field: FieldInfo) -> FieldInfo:
        merged = copy(field)
        owners = [name for name, section in self.variants.items() if key in section.model_fields]
        if key == self.tag:
            merged.annotation = Literal[tuple(self.variants)]  # type: ignore[assignment]
            merged.default = owners[0]
        elif len(owners) < len(self.variants):
            merged.metadata = [*field.metadata, Variant(self.tag, *owners)]
        return merged

    def model_json_schema(self) -> dict[str, Any]:
        """Returns the schema of a table with the keys of all variants."""
        schemas = [section.model_json_schema() for section in self.variants.values()]
        properties: dict[str, Any] = {}
        for schema in schemas:
            properties = {**schema["properties"], **properties}
        tag = self.fields[self.tag]
        properties[self.tag] |= {"description": tag.description, "enum": list(self.variants)}
        properties[self.tag].pop("const", None)
        table = {"description": self.base.__doc__, "title": self.base.__name__}
        return schemas[0] | table | {"properties": {key: properties[key] for key in self.fields}}

    def changed(self, section: S, values: Mapping[str, Any]) -> S:
        """Returns a section with other, valid values; another variant has its own defaults."""
        tag = getattr(section, self.tag)
        if values.get(self.tag, tag) == tag:
            return section.model_copy(update=values)
        common = {key: getattr(section, key) for key in self.base.model_fields}
        return self.variants[values[self.tag]].model_validate({**common, **values})

    def tag_of(self, table: Any) -> str | None:
        """Returns the tag of a table; None if it is not that of a variant."""
        if not isinstance(table, dict):
            return None
        tag = table.get(self.tag, self.fields[self.tag].default)
        return tag if isinstance(tag, str) and tag in self.variants else None

    def foreign_keys(self, tag: str) -> set[str]:
        """Returns the keys that only other variants have."""
        return self.fields.keys() - self.variants[tag].model_fields.keys()

    def fields_of(self, tag: str) -> dict[str, FieldInfo]:
        """Returns the keys of one variant; its tag may still be that of any."""
        return {**self.variants[tag].model_fields, self.tag: self.fields[self.tag]}

    def validate(self, table: Any) -> Any:
        """Validates a table by its variant; without one, returns {}, which the base rejects."""
        if not isinstance(table, dict):
            return table
        tag = self.tag_of(table)
        return {} if tag is None else self.variants[tag].model_validate(table)
