"""Reads configurations in run.json and manifests, which an older version may have written."""

import math
from collections.abc import Mapping
from typing import Any

from titan_lite.config.dims import BATCH, resolve_global_batch
from titan_lite.config.problems import FIELDS, literal
from titan_lite.config.schema import Model


def setting(config: Mapping[str, Any], key: str) -> Any:
    """The value of section.key; the default if an older version did not have the key."""
    section, _, name = key.partition(".")
    return config.get(section, {}).get(name, FIELDS[section][name].default)


def stored_model(config: Mapping[str, Any]) -> Model:
    """The stored [model], without the key `module` that older versions had."""
    return Model(**{key: value for key, value in config["model"].items() if key != "module"})


def global_batch_size(config: Mapping[str, Any], mesh: Mapping[str, int]) -> int:
    """Samples per optimizer step on a mesh of these degrees."""
    return resolve_global_batch(
        setting(config, "training.global_batch_size"),
        setting(config, "training.local_batch_size"),
        math.prod(mesh[axis] for axis in BATCH),
    )


def words(value: Any) -> str:
    """Formats a value like TOML, including values that TOML does not have."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key} = {words(part)}' for key, part in value.items())}}}"
    return "not set" if value is None else literal(value)
