"""From a family's data to an nn.Module."""

import importlib

from titan_lite.models.args import DecoderArgs, EncoderArgs
from titan_lite.models.family import Family
from titan_lite.nn.decoder import Decoder
from titan_lite.nn.encoder import Encoder
from titan_lite.nn.transformer import Transformer


def build(family: Family, args: DecoderArgs) -> Transformer:
    """Imports the family's "module:function" and calls it; works under torch.device("meta")."""
    module, separator, function = family.build.partition(":")
    if not separator or not function:
        raise ValueError(
            f"family {family.name!r}: build must be 'module:function', not {family.build!r}"
        )
    builder = getattr(importlib.import_module(module), function, None)
    if builder is None:
        raise ValueError(f"family {family.name!r}: module {module!r} has no function {function!r}")
    model: Transformer = builder(args)
    return model


def build_decoder(args: DecoderArgs) -> Decoder:
    """The generic decoder."""
    return Decoder(args)


def build_encoder(args: EncoderArgs) -> Encoder:
    """The generic encoder."""
    return Encoder(args)
