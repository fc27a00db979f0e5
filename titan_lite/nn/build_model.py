"""Builds an nn.Module from a family's data."""

from titan_lite.config.registry import load
from titan_lite.models.args import DecoderArgs
from titan_lite.models.family import Family
from titan_lite.nn.transformer import Transformer


def build_model(family: Family, args: DecoderArgs) -> Transformer:
    """Imports the family's "module:function" and calls it; works under torch.device("meta")."""
    model: Transformer = load(family.build)(args)
    return model
