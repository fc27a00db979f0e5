"""Compares the model of a checkpoint, as its manifest names it, with that of a run; no torch."""

import dataclasses
from typing import Any

from titan_lite.checkpoint.manifest import Manifest
from titan_lite.config.schema import Model
from titan_lite.models.args import DecoderArgs
from titan_lite.models.hf_config import TUNABLE, UNCOMPARED
from titan_lite.models.registry import resolve


def model_differences(
    manifest: Manifest, section: Model, args: DecoderArgs
) -> dict[str, tuple[Any, Any]]:
    """Fields of the args -> (the checkpoint's value, the run's), where weights cannot be loaded.

    Empty where the manifest names no model that can be resolved here, as one of a module that the
    run does not import: loading then compares the weights themselves.
    """
    try:
        saved_section = Model.model_validate(manifest.config["model"])
        if saved_section.module not in ("", section.module):
            return {}
        _, saved = resolve(saved_section)
    except (KeyError, ValueError):
        return {}
    if type(saved) is not type(args):
        return {"name": (saved_section.name, section.name)}
    names = {field.name for field in dataclasses.fields(args)}.difference(UNCOMPARED, TUNABLE)
    if args.positions == "learned":
        names.add("max_seq_len")
    pairs = {name: (_value(saved, name), _value(args, name)) for name in sorted(names)}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _value(args: DecoderArgs, name: str) -> Any:
    return args.head_size if name == "head_dim" else getattr(args, name)
