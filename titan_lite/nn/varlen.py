"""torch's attention over sequences of different lengths; importing it imports the compiler."""

import inspect

import torch
from torch.nn.attention.varlen import varlen_attn

__all__ = ["OPERATION", "TAKES_GQA", "varlen_attn"]

OPERATION = torch.ops.torch_attn._varlen_attn.default
# torch 2.11 takes any number of key/value heads without an argument.
TAKES_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters
