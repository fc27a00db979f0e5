"""torch's attention over sequences of several lengths; its import takes the compiler's with it."""

import inspect

import torch
from torch.nn.attention.varlen import varlen_attn

__all__ = ["OPERATION", "TAKES_GQA", "varlen_attn"]

OPERATION = torch.ops.torch_attn._varlen_attn.default
# torch 2.11 takes any number of key/value heads without an argument.
TAKES_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters
