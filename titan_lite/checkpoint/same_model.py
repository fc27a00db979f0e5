"""Compares the model in a checkpoint's manifest with that of a run. Does not import torch."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from titan_lite.checkpoint.manifest import CheckpointManifest
from titan_lite.config.schema import Model
from titan_lite.config.stored import stored_model
from titan_lite.models.args import DecoderArgs
from titan_lite.models.registry import resolve

# Fields whose values follow from the names or shapes of the weights.
IMPLIED_BY_WEIGHTS = frozenset(
    {
        "dim",
        "num_layers",
        "ffn_dim",
        "num_experts",
        "shared_experts",
        "dense_layers",
        "dense_dim",
        "q_rank",
        "kv_rank",
        "vocab_size",
        "norm",
        "qkv_bias",
        "out_bias",
        "ffn_bias",
        "qk_norm",
        "positions",
        "num_token_types",
        "post_norm",
        "max_seq_len",  # with learned positions
    }
)


def model_facts(family: str, args: DecoderArgs) -> dict[str, Any]:
    """Returns the model as a manifest stores it: its family's name, and the args as JSON."""
    facts = {"name": family, **dataclasses.asdict(args), "head_dim": args.head_size}
    result: dict[str, Any] = json.loads(json.dumps(facts, default=str))
    return result


def model_differences(
    manifest: CheckpointManifest, section: Model, args: DecoderArgs
) -> dict[str, tuple[Any, Any]]:
    """Returns field of the args, or "name" -> (the checkpoint's value, the run's) if they differ.

    section, args: the run's.

    Empty if the manifest's model is unknown, for example one of a plugin that the run does not
    import. Loading then compares the weights themselves.
    """
    own = model_facts(section.name, args)
    saved = manifest.model or _resolved(manifest.config) or own
    # A field that was added after the checkpoint was saved had its default.
    defaults = {field.name: field.default for field in dataclasses.fields(args)}
    pairs = {
        name: (saved.get(name, defaults.get(name)), own.get(name))
        for name in own | saved
        # Older versions saved it when the padding of the vocabulary depended on parallel.tp.
        if name != "vocab_multiple"
    }
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _resolved(config: Mapping[str, Any]) -> dict[str, Any]:
    """Computes the facts from a stored [model], for manifests without facts."""
    try:
        section = stored_model(config)
        return model_facts(section.name, resolve(section)[1])
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}
