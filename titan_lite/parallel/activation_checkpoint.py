"""Activation checkpointing: which activations are kept, and which are recomputed in backward."""

from collections import Counter
from functools import partial
from typing import Any

import torch
import torch._functorch.config as compiler_config
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointWrapper,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import (
    SAC_IGNORED_OPS,
    CheckpointPolicy,
    SelectiveCheckpointContext,
    create_selective_checkpoint_contexts,
)

from titan_lite.config.activation_checkpoint import ActivationCheckpoint, SavedOp
from titan_lite.nn import grouped_matmul  # noqa: F401  registers an operation of that name
from titan_lite.nn.transformer import Transformer
from titan_lite.parallel import context_attention  # noqa: F401  registers sharded_attention
from titan_lite.parallel.attention_ops import CPU_FLASH, CUDNN, EFFICIENT, FLASH, OVERRIDEABLE

aten, collectives = torch.ops.aten, torch.ops._c10d_functional

profiler = torch.ops.profiler
# FSDP2's profiler annotations: a unit inside a block has more of them in recomputation.
SAC_IGNORED_OPS |= {
    profiler._record_function_enter_new.default,
    profiler._record_function_exit._RecordFunction,
}
MATMULS = (aten.mm.default, aten.addmm.default, aten._scaled_mm.default)
OPS: dict[SavedOp, tuple[Any, ...]] = {
    # Cost grows with the square of the sequence, the result only with its length.
    "attention": (
        FLASH.default,
        EFFICIENT.default,
        CUDNN.default,
        OVERRIDEABLE.default,
        CPU_FLASH.default,
        torch.ops.titan_lite.sharded_attention.default,
        torch.ops.higher_order.flex_attention,
    ),
    "matmul": MATMULS,
    "every_second_matmul": MATMULS,
    # A collective repeated in backward is waited for twice.
    "reduce_scatter": (collectives.reduce_scatter_tensor.default,),
    "all_reduce": (collectives.all_reduce.default,),
    # The largest magnitude of a tensor, from which float8 takes its scale: one number.
    "max": (aten.max.default,),
    # Integers: their recomputation must not choose other experts.
    "routing": (aten.sort.stable,),
    "all_to_all": (collectives.all_to_all_single.default,),
    "grouped_matmul": (torch.ops.titan_lite.grouped_matmul.default,),
}
"""The operations behind each name of `activation_checkpoint.save`, as the dispatcher sees them.

Attention inside documents is not among them: its import is one of those that take seconds.
"""


def apply_activation_checkpoint(model: Transformer, section: ActivationCheckpoint) -> None:
    """Wraps the chosen blocks in place; for "memory_budget", configures the compiler instead.

    The budget is one of the whole process, for what is compiled from here on.
    """
    compiler_config.activation_memory_budget = section.compiler_budget
    settings: dict[str, Any] = {}
    if section.saved_ops:
        # One object for all blocks, which remain equal for the compiler: one graph serves them.
        settings["context_fn"] = partial(_contexts, section.saved_ops)
    blocks = list(model.layers.named_children())
    for index in section.layers(len(blocks)):
        name, block = blocks[index]
        # The random state is restored for a recomputed dropout to drop the same: no model here
        # draws, but one from a plugin may, and its gradients would be wrong in silence.
        wrapped = checkpoint_wrapper(block, preserve_rng_state=True, **settings)
        model.layers.register_module(name, wrapped)


class SavePolicy:
    """Decides for torch, for each operation of one forward of a block, whether its result is kept.

    Of "every_second_matmul" the second, fourth, ... are kept: the last of an odd number is not, as
    with a gated feed-forward's, whose result backward does not need.
    """

    def __init__(self, save: tuple[SavedOp, ...]) -> None:
        self.saved = {op for name in save for op in OPS[name]}
        if "attention" in save:
            from titan_lite.nn.varlen import OPERATION

            self.saved.add(OPERATION)
        self.every_second = set(MATMULS) if "every_second_matmul" in save else set()
        # Separately for forward and recomputation, for both to find the same matmuls second:
        # torch < 2.13 repeats the calls in backward.
        self.matmuls: Counter[bool] = Counter()

    def __call__(
        self, context: SelectiveCheckpointContext, op: Any, *_args: Any, **_kwargs: Any
    ) -> CheckpointPolicy:
        save = op in self.saved
        if op in self.every_second:
            self.matmuls[context.is_recompute] += 1
            save = self.matmuls[context.is_recompute] % 2 == 0
        # PREFER leaves it to the compiler to keep what is cheaper kept.
        return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE


def _contexts(save: tuple[SavedOp, ...]) -> Any:
    """Returns the context managers of one block's forward and of its recomputation."""
    return create_selective_checkpoint_contexts(SavePolicy(save))


def is_checkpointed(block: nn.Module) -> bool:
    """Returns whether backward computes the block again."""
    return isinstance(block, CheckpointWrapper)


def saved_ops(block: nn.Module) -> tuple[str, ...]:
    """Returns the operations whose results a checkpointed block keeps; () for other blocks."""
    if not isinstance(block, CheckpointWrapper):
        return ()
    context_fn = block.checkpoint_fn.keywords.get("context_fn")
    return () if context_fn is None else context_fn.args[0]


def memory_budget() -> float:
    """Returns the share of the activation memory that the compiler may use; 1.0: no budget."""
    return float(compiler_config.activation_memory_budget)
