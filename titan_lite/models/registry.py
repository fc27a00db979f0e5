"""The table of model families: the built-in ones, and those that plugins register."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from titan_lite.config.problems import SettingError, did_you_mean, nearest, quote
from titan_lite.config.registry import Registry
from titan_lite.config.schema import Model
from titan_lite.models.args import DecoderArgs
from titan_lite.models.bert import BERT, MEGATRON_BERT
from titan_lite.models.deepseek import DEEPSEEK_V3
from titan_lite.models.family import Family
from titan_lite.models.gpt import GPT, GPT_NEOX
from titan_lite.models.hf_config import unfit_keys
from titan_lite.models.internlm import INTERNLM
from titan_lite.models.llama import LLAMA
from titan_lite.models.moe import MIXTRAL, QWEN3_MOE
from titan_lite.models.qwen import QWEN, QWEN2_5, QWEN3

__all__ = ["Family", "families", "family_of", "register", "resolve"]

T = TypeVar("T")
_FAMILIES: Registry[Family] = Registry(
    "model family",
    {
        family.name: family
        for family in (
            *(LLAMA, INTERNLM, QWEN, QWEN2_5, QWEN3, QWEN3_MOE, MIXTRAL, DEEPSEEK_V3),
            *(GPT_NEOX, GPT, BERT, MEGATRON_BERT),
        )
    },
)


def register(family: Family) -> None:
    """Adds a family; ValueError if another one has its name."""
    _FAMILIES.register(family.name, family)


def families() -> Mapping[str, Family]:
    """Returns all registered families by name."""
    return _FAMILIES


def resolve(section: Model) -> tuple[Family, DecoderArgs]:
    """Returns the family and the args of [model], with its overrides applied.

    Raises SettingError for an unknown family, flavor or override, with the nearest existing one.
    """
    family = _look_up("model.name", "family", section.name, _FAMILIES)
    args = _look_up("model.flavor", "flavor", section.flavor, family.flavors)
    overrides = section.model_dump(exclude={"name", "flavor"}, exclude_none=True)
    fields = [field.name for field in dataclasses.fields(args)]
    for key in overrides:
        if key not in fields:
            raise SettingError(
                f"model.{key}",
                f"family {quote(family.name)} has no {key}; it has {', '.join(fields)}",
            )
    return family, dataclasses.replace(args, **overrides)


def family_of(config: Mapping[str, Any], registered: Mapping[str, Family]) -> Family:
    """Returns the family of a config.json; ValueError for an unknown architecture.

    If several families have the class, it is the first whose constants match config.json.
    """
    wanted = config.get("architectures") or []
    known = [(family, family.hf_config) for family in registered.values() if family.hf_config]
    # Plugins' families come later.
    matching = [(family, hf) for family, hf in known if hf.matches_architecture(wanted)]
    if not matching:
        raise ValueError(
            f"config.json: no model family supports architectures {wanted} "
            f"(known: {', '.join(sorted({hf.architecture for _, hf in known}))})"
        )
    fitting = (family for family, hf in matching if not unfit_keys(config, hf))
    return next(fitting, matching[0][0])


def _look_up(key: str, kind: str, name: str, known: Mapping[str, T]) -> T:
    if name not in known:
        hint = did_you_mean(nearest(name, known))
        message = f"unknown {kind} {quote(name)}{hint} (known: {', '.join(sorted(known))})"
        raise SettingError(key, message)
    return known[name]
