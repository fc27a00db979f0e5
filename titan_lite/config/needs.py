"""Conditions under which keys have an effect; schema.py annotates keys with them."""

import json
from collections.abc import Collection, Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo


class Needs:
    """A key has an effect if another is one of `values`, exceeds `above`, or is not `unless`.

    keys: other keys, in the same table or as section.key; if there are several, one is enough.
    """

    def __init__(
        self,
        *keys: str,
        values: Collection[Any] = (),
        above: float | None = None,
        unless: str = "",
    ) -> None:
        self.keys, self.values, self.above, self.unless = keys, values, above, unless

    def holds(self, config: BaseModel, table: str) -> bool:
        """Returns True if the key of a table has an effect."""
        return any(self._accepts(value_of(config, key)) for key in self._dotted(table))

    def _accepts(self, value: Any) -> bool:
        if self.above is not None:
            return bool(value > self.above)
        return value in self.values if self.values else value != self.unless

    def _dotted(self, table: str) -> list[str]:
        return [key if "." in key else f"{table}.{key}" for key in self.keys]

    def stated(self, table: str) -> str:
        """The condition in words, such as 'parallel.tp > 1'."""
        keys = " or ".join(self._dotted(table))
        if self.above is not None:
            return f"{keys} > {self.above:g}"
        if self.values:
            return f"{keys} = {' or '.join(map(json.dumps, self.values))}"
        return f"{keys} other than {json.dumps(self.unless)}" if self.unless else f"{keys} set"

    def unmet(self, config: BaseModel, table: str) -> str:
        """The reason why the condition is not met, such as 'parallel.tp is 1'."""
        keys = self._dotted(table)
        value = value_of(config, keys[0])
        state = json.dumps(value) if value != "" else "not set"
        return f"{' and '.join(keys)} {'are' if len(keys) > 1 else 'is'} {state}"


class Variant(Needs):
    """A key of some variants of a table, which is an error in the others."""

    def __init__(self, key: str, *values: str) -> None:
        super().__init__(key, values=values)


def value_of(config: BaseModel, key: str) -> Any:
    """The value of section.key."""
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


def needs_of(section: type[BaseModel], key: str, field: FieldInfo) -> list[Needs]:
    """The conditions of a key of a table, the table's own condition first."""
    of_table: Needs | None = getattr(section, "NEEDS", None)
    always = getattr(section, "ALWAYS", ())
    first = [of_table] if of_table and key not in (*of_table.keys, *always) else []
    return [*first, *(item for item in field.metadata if isinstance(item, Needs))]


def unmet_needs(config: BaseModel) -> Iterator[tuple[str, str, Needs]]:
    """The keys that were set without effect, with their tables and unmet needs."""
    for table, section in config:
        for key, field in type(section).model_fields.items():
            if getattr(section, key) != field.default:
                needs = needs_of(type(section), key, field)
                if missing := [need for need in needs if not need.holds(config, table)]:
                    yield table, key, missing[0]
