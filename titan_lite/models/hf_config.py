"""Between a family's args and the config.json of Hugging Face transformers."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from titan_lite.models.args import DecoderArgs, RopeScaling

if TYPE_CHECKING:
    from titan_lite.models.family import Family

_SCALING_KEYS = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_seq_len": "original_max_position_embeddings",
}


@dataclass(frozen=True, kw_only=True)
class HFConfig:
    """How config.json says what a family's args say."""

    architecture: str
    """The class in transformers, which `architectures` names."""
    model_type: str
    keys: Mapping[str, str]
    """Fields and properties of the args -> keys of config.json."""
    defaults: Mapping[str, object] = field(default_factory=dict)
    """What transformers takes where config.json lacks a key, or has null."""
    fallbacks: Mapping[str, str] = field(default_factory=dict)
    """Keys that have another key's value where config.json lacks them, or has null."""
    constants: Mapping[str, object] = field(default_factory=dict)
    """Keys that can have no other value in this family, which is also transformers' default."""


@dataclass(frozen=True, kw_only=True)
class HFLayout:
    """How a tensor of Hugging Face's is stored, where it is not one of ours as it is.

    Several names of ours that Family.hf_key_map gives the same name of Hugging Face's are one
    tensor there: their rows one after the other, in the order of the map.
    """

    groups: str = ""
    """The args' number of groups that the rows of each part are dealt to, as in GPT-NeoX's
    q, k, v of head 0, q, k, v of head 1, ...: "num_heads"; empty: each part in one piece."""
    transposed: bool = False
    """Stored as (in, out), as by GPT-2's Conv1D."""


def family_of(config: Mapping[str, Any], families: Mapping[str, "Family"]) -> "Family":
    """The family of a config.json; ValueError naming the architecture where there is none."""
    wanted = config.get("architectures") or []
    by_architecture: dict[str, Family] = {}
    for family in families.values():
        if family.hf_config is not None:
            # Those of a user's module come later.
            by_architecture.setdefault(family.hf_config.architecture, family)
    found = [by_architecture[name] for name in wanted if name in by_architecture]
    if not found:
        raise ValueError(
            f"config.json: no model family here is of architectures {wanted} "
            f"(known: {', '.join(sorted(by_architecture))})"
        )
    return found[0]


def args_from_hf(config: Mapping[str, Any], hf: HFConfig) -> DecoderArgs:
    """The args that a config.json describes; ValueError naming the key at fault."""
    config = _flatten_rope(config, hf)
    for key, value in hf.constants.items():
        found = config.get(key)
        if found is not None and found != value:
            raise ValueError(
                f"config.json: {key} is {found!r}; {hf.architecture} here is built for {value!r}"
            )
    known = {known.name: known for known in dataclasses.fields(DecoderArgs)}
    values: dict[str, Any] = {}
    for name, key in hf.keys.items():
        value = _look_up(config, key, hf)
        if name in known:
            if value is None and known[name].default is dataclasses.MISSING:
                raise ValueError(f"config.json has no {key}")
            if value is not None:
                values[name] = value
    values["rope_scaling"] = _read_scaling(config.get("rope_scaling"))
    args = DecoderArgs(**values)
    for name, key in hf.keys.items():
        if config.get(key) not in (None, getattr(args, name)):
            raise ValueError(
                f"config.json: {key} is {config[key]!r}, and {getattr(args, name)!r} is the only "
                "value that its other numbers allow here"
            )
    return args


def differences(
    config: Mapping[str, Any], hf: HFConfig, args: DecoderArgs
) -> dict[str, tuple[object, object]]:
    """Fields of the args -> (config.json's value, the args'), where they differ.

    The longest sequence is left out: no weight knows it.
    """
    theirs = args_from_hf(config, hf)
    pairs = {
        name: (getattr(theirs, name), getattr(args, name))
        for name in (*hf.keys, "rope_scaling")
        if name != "max_seq_len"
    }
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def hf_config_from_args(
    args: DecoderArgs,
    hf: HFConfig,
    *,
    dtype: str,
    bos_id: int | None = None,
    eos_id: int | None = None,
) -> dict[str, Any]:
    """What config.json says of a model; `dtype` as torch spells it, ids None without tokenizer."""
    config: dict[str, Any] = {
        "architectures": [hf.architecture],
        "model_type": hf.model_type,
        **{key: getattr(args, name) for name, key in hf.keys.items()},
        **hf.constants,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        # transformers 5 calls it dtype, and reads both.
        "torch_dtype": dtype,
    }
    if args.rope_scaling is not None:
        scaling = dataclasses.asdict(args.rope_scaling)
        config["rope_scaling"] = {"rope_type": "llama3"} | {
            key: scaling[name] for name, key in _SCALING_KEYS.items()
        }
    return config


def _look_up(config: Mapping[str, Any], key: str, hf: HFConfig) -> Any:
    for candidate in (key, hf.fallbacks.get(key, key)):
        if config.get(candidate) is not None:
            return config[candidate]
    return hf.defaults.get(key)


def _flatten_rope(config: Mapping[str, Any], hf: HFConfig) -> Mapping[str, Any]:
    """transformers 4's spelling of the rotary embedding, from transformers 5's."""
    rope = dict(config.get("rope_parameters") or {})
    if not rope:
        return config
    theta = rope.pop("rope_theta", None)
    return {**config, hf.keys.get("rope_theta", "rope_theta"): theta, "rope_scaling": rope}


def _read_scaling(scaling: Mapping[str, Any] | None) -> RopeScaling | None:
    # Older files say "type".
    kind = (scaling or {}).get("rope_type", (scaling or {}).get("type", "default"))
    if scaling is None or kind == "default":
        return None
    if kind != "llama3":
        raise ValueError(
            f'config.json: rope_scaling is of type {kind!r}; only "llama3" is known here'
        )
    missing = [key for key in _SCALING_KEYS.values() if key not in scaling]
    if missing:
        raise ValueError(f"config.json: rope_scaling lacks {', '.join(missing)}")
    return RopeScaling(**{name: scaling[key] for name, key in _SCALING_KEYS.items()})
