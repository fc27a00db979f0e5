"""Builds an nn.Module from a family's data."""

from titan_lite.config.registry import load
from titan_lite.models.args import DecoderArgs, EncoderArgs
from titan_lite.models.family import Family
from titan_lite.nn.decoder import Decoder
from titan_lite.nn.encoder import Encoder
from titan_lite.nn.transformer import Transformer


def build_model(family: Family, args: DecoderArgs) -> Transformer:
    """Imports the family's "module:function" and calls it; works under torch.device("meta")."""
    model: Transformer = load(family.build)(args)
    return model


def build_decoder(args: DecoderArgs) -> Decoder:
    """Builds the generic decoder."""
    return Decoder(args)


def build_encoder(args: EncoderArgs) -> Encoder:
    """Builds the generic encoder."""
    return Encoder(args)
