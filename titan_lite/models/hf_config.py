"""Converts between a family's args and the config.json of Hugging Face transformers."""

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from titan_lite.config.problems import one_of
from titan_lite.models.args import DecoderArgs, RopeScaling

NO_HF_CONFIG = (
    'family "{}" cannot be converted to or from transformers, because it defines no hf_config'
)

# Fields of the args that affect training but not the weights.
TRAINING_ONLY_FIELDS = (
    "max_seq_len",
    "fp32_residual",
    "hidden_dropout",
    "attention_dropout",
    "balance_loss",
    "balance_coeff",
    "z_loss_coeff",
    "bias_rate",
)
TUNABLE = ("rope_theta", "rope_scaling", "norm_eps")
"""Fields of the args that a run may set to other values than its weights were trained with."""
USUAL_KEYS = {
    "dim": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_attention_heads",
    "ffn_dim": "intermediate_size",
    "vocab_size": "vocab_size",
    "max_seq_len": "max_position_embeddings",
}
"""Fields of the args -> keys of config.json in most classes of transformers."""
_SCALING_KEYS = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_seq_len": "original_max_position_embeddings",
}


@dataclass(frozen=True, kw_only=True)
class HFConfig:
    """How a family's args are written in config.json."""

    architecture: str
    """The model class in transformers, as listed in `architectures`."""
    aliases: tuple[str, ...] = ()
    """Other classes with the same weights, which are accepted as well."""
    model_type: str
    args: type[DecoderArgs] = DecoderArgs
    """Class of the args that are read from config.json."""
    keys: Mapping[str, str]
    """Fields of the args -> keys of config.json; several fields can read the same key."""
    choices: Mapping[str, object] = field(default_factory=dict)
    """Fields of the args that have this value in every model of the class."""
    defaults: Mapping[str, object] = field(default_factory=dict)
    """Defaults of transformers for keys that config.json lacks, or that are null."""
    fallbacks: Mapping[str, str] = field(default_factory=dict)
    """Key -> the key whose value it takes if config.json lacks it, or if it is null."""
    names: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Key -> names of its values, Hugging Face -> args. If several Hugging Face names map to one
    name in the args, the first is written."""
    constants: Mapping[str, object] = field(default_factory=dict)
    """Keys with the only value that this family supports, which is also transformers' default."""

    def matches_architecture(self, architectures: Collection[str]) -> bool:
        """Returns True if the `architectures` of a config.json include this class."""
        return not {self.architecture, *self.aliases}.isdisjoint(architectures)


@dataclass(frozen=True, kw_only=True)
class HFLayout:
    """The layout of a Hugging Face tensor that differs from our parameter.

    Parameters that Family.hf_key_map maps to the same Hugging Face name are one tensor there: their
    rows are concatenated in the order of the map.
    """

    groups: str = ""
    """Field of the args with the number of groups in which the rows of the parameters alternate:
    "num_heads" for GPT-NeoX's q, k, v of head 0, q, k, v of head 1, ...; empty: no groups."""
    transposed: bool = False
    """Stored as (in, out), as in GPT-2's Conv1D."""


def args_from_hf(config: Mapping[str, Any], hf: HFConfig) -> DecoderArgs:
    """Converts a config.json to args; ValueError with the key that is not supported."""
    config = _flatten_rope(config, hf)
    for key in unfit_keys(config, hf):
        raise ValueError(
            f"config.json: {key} = {config[key]!r} is not supported; titan_lite's "
            f"{hf.architecture} requires {hf.constants[key]!r}"
        )
    known = {known.name: known for known in dataclasses.fields(hf.args)}
    values: dict[str, Any] = dict(hf.choices)
    for name, key in hf.keys.items():
        value = _look_up(config, key, hf)
        if value is None and known[name].default is dataclasses.MISSING:
            raise ValueError(f"config.json has no {key}")
        if value is not None:
            values[name] = _from_hf(value, key, hf)
    values["rope_scaling"] = _read_scaling(config.get("rope_scaling"))
    args = hf.args(**values)
    # Flavors set head_dim to None if it is dim / num_heads.
    follows = args.head_size * args.num_heads == args.dim
    return dataclasses.replace(args, head_dim=None) if follows else args


def hf_differences(
    config: Mapping[str, Any], hf: HFConfig, args: DecoderArgs
) -> dict[str, tuple[object, object]]:
    """Returns field -> (config.json's value, the args' value) for fields that differ.

    Fields that do not affect weights are left out. Among them is max_seq_len; for learned
    positions, loading compares the shape of their weight.
    """
    hf_args = args_from_hf(config, hf)
    pairs = {
        known.name: (_value(hf_args, known.name), _value(args, known.name))
        for known in dataclasses.fields(args)
        if known.name not in TRAINING_ONLY_FIELDS
    }
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def hf_config_from_args(
    args: DecoderArgs,
    hf: HFConfig,
    *,
    dtype: str,
    bos_id: int | None = None,
    eos_id: int | None = None,
    pad_id: int | None = None,
) -> dict[str, Any]:
    """Returns a model's config.json. dtype: its name in torch. ids: None without a tokenizer."""
    config: dict[str, Any] = {
        "architectures": [hf.architecture],
        "model_type": hf.model_type,
        **{key: _to_hf(_value(args, name), key, hf) for name, key in hf.keys.items()},
        **hf.constants,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        # This embedding gets no gradient in transformers; BERT's default is token 0.
        "pad_token_id": pad_id,
        # transformers 5 writes it as dtype, but reads both.
        "torch_dtype": dtype,
    }
    if args.rope_scaling is not None:
        scaling = dataclasses.asdict(args.rope_scaling)
        config["rope_scaling"] = {"rope_type": "llama3"} | {
            key: scaling[name] for name, key in _SCALING_KEYS.items()
        }
    return config


def unsupported_in_hf(args: DecoderArgs, hf: HFConfig) -> str:
    """Returns the features of a model that config.json cannot express, or ""."""
    different = hf_differences(hf_config_from_args(args, hf, dtype="float32"), hf, args)
    words = [f"{name} {value} (only {hf_value})" for name, (hf_value, value) in different.items()]
    return f"{hf.architecture} does not support {', '.join(words)}" if words else ""


def _from_hf(value: Any, key: str, hf: HFConfig) -> Any:
    """Returns the args' name for a value of config.json."""
    names = hf.names.get(key)
    if names is None:
        return value
    if value not in names:
        known = one_of([*map(repr, names)])
        raise ValueError(
            f"config.json: {key} = {value!r} is not supported; titan_lite's {hf.architecture} "
            f"requires {known}"
        )
    return names[value]


def _to_hf(value: Any, key: str, hf: HFConfig) -> Any:
    """Returns config.json's name for a value of the args, the first one where it has several."""
    names = hf.names.get(key)
    if names is None:
        return value
    return next((hf_name for hf_name, name in names.items() if name == value), next(iter(names)))


def _value(args: DecoderArgs, name: str) -> Any:
    """Returns a field of the args, with head_dim resolved."""
    return args.head_size if name == "head_dim" else getattr(args, name)


def unfit_keys(config: Mapping[str, Any], hf: HFConfig) -> list[str]:
    """Returns the keys whose values the model class does not support."""
    return [key for key, value in hf.constants.items() if config.get(key) not in (None, value)]


def _look_up(config: Mapping[str, Any], key: str, hf: HFConfig) -> Any:
    for candidate in (key, hf.fallbacks.get(key, key)):
        if config.get(candidate) is not None:
            return config[candidate]
    return hf.defaults.get(key)


def _flatten_rope(config: Mapping[str, Any], hf: HFConfig) -> Mapping[str, Any]:
    """Converts the rotary keys of transformers 5 to those of transformers 4."""
    rope = dict(config.get("rope_parameters") or {})
    if not rope:
        return config
    flat = {
        hf.keys.get(name, key): rope.pop(key)
        for name, key in (
            ("rope_theta", "rope_theta"),
            ("rotary_fraction", "partial_rotary_factor"),
        )
        if key in rope
    }
    return {**config, **flat, "rope_scaling": rope}


def _read_scaling(scaling: Mapping[str, Any] | None) -> RopeScaling | None:
    # Older files have "type".
    kind = (scaling or {}).get("rope_type", (scaling or {}).get("type", "default"))
    if scaling is None or kind == "default":
        return None
    if kind != "llama3":
        raise ValueError(
            f'config.json: rope_scaling is of type {kind!r}; only "llama3" is supported'
        )
    missing = [key for key in _SCALING_KEYS.values() if key not in scaling]
    if missing:
        raise ValueError(f"config.json: rope_scaling lacks {', '.join(missing)}")
    return RopeScaling(**{name: scaling[key] for name, key in _SCALING_KEYS.items()})
