"""Activation checkpointing: chooses the activations to keep; the others are recomputed."""

from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch._functorch.config as compiler_config
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointWrapper,
    checkpoint_wrapper,
)
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import (
    SAC_IGNORED_OPS,
    CheckpointPolicy,
    SelectiveCheckpointContext,
    create_selective_checkpoint_contexts,
)

from titan_lite.config.activation_checkpoint import ActivationCheckpoint, SavedOp
from titan_lite.nn import grouped_matmul  # noqa: F401  registers an operation of that name
from titan_lite.nn.transformer import Transformer
from titan_lite.parallel import (
    context_attention,  # noqa: F401  registers sharded_attention
    row_exchange,  # noqa: F401  registers all_to_all_rows
)
from titan_lite.parallel.attention_ops import CPU_FLASH, CUDNN, EFFICIENT, FLASH, OVERRIDEABLE

aten, collectives = torch.ops.aten, torch.ops._c10d_functional

profiler = torch.ops.profiler
# Ignores FSDP2's profiler annotations: recomputation runs more of them for units inside a block.
SAC_IGNORED_OPS |= {
    profiler._record_function_enter_new.default,
    profiler._record_function_exit._RecordFunction,
}
MATMULS = (aten.mm.default, aten.addmm.default, aten._scaled_mm.default)
SUMS = (collectives.reduce_scatter_tensor.default, collectives.all_reduce.default)
OPS: dict[SavedOp, tuple[Any, ...]] = {
    # The cost grows with the square of the sequence length, the result only linearly.
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
    # Recomputing a collective costs communication again.
    "reduce_scatter": SUMS[:1],
    "all_reduce": SUMS[1:],
    # The maximum for float8's scale: one number.
    "max": (aten.max.default,),
    # Integers: their recomputation must not choose other experts.
    "routing": (aten.sort.stable,),
    "all_to_all": (
        collectives.all_to_all_single.default,
        torch.ops.titan_lite.all_to_all_rows.default,
    ),
    "grouped_matmul": (torch.ops.titan_lite.grouped_matmul.default,),
}
"""Dispatcher operations of each name in `activation_checkpoint.save`.

Attention inside documents is added elsewhere, because importing it takes seconds.
"""


def apply_activation_checkpoint(model: Transformer, section: ActivationCheckpoint) -> None:
    """Wraps the chosen blocks in place; for "memory_budget", configures the compiler instead.

    The budget applies to everything that the process compiles afterwards.
    """
    compiler_config.activation_memory_budget = section.compiler_budget
    settings: dict[str, Any] = {}
    if section.saved_ops:
        # One object for all blocks, so that they are equal for the compiler and share one graph.
        settings["context_fn"] = partial(_contexts, section.saved_ops)
    blocks = list(model.layers.named_children())
    for index in section.layers(len(blocks)):
        name, block = blocks[index]
        # Restores the random state for recomputation. Our models do not need it, but a plugin's
        # may use random dropout, whose gradients would otherwise be wrong.
        wrapped = checkpoint_wrapper(block, preserve_rng_state=True, **settings)
        model.layers.register_module(name, wrapped)


class SavePolicy:
    """torch's policy: decides for each operation of a block's forward whether to keep its result.

    "every_second_matmul" keeps the second, fourth, ... result. With an odd number, as in blocks
    with a gated feed-forward, the last one is not kept; backward does not need it.

    kept: torch's results of forward, by operation. If a sum over ranks is kept, its input is not.
    """

    kept: Mapping[Any, Any]

    def __init__(self, save: tuple[SavedOp, ...]) -> None:
        self.saved = {op for name in save for op in OPS[name]}
        if "attention" in save:
            from titan_lite.nn.varlen import OPERATION

            self.saved.add(OPERATION)
        self.every_second = set(MATMULS) if "every_second_matmul" in save else set()
        # Separate counts for forward and recomputation, so that both number the matmuls equally.
        # torch < 2.13 calls the policy in backward as well.
        self.matmuls: Counter[bool] = Counter()
        self.last_product: Any = None

    def __call__(
        self, context: SelectiveCheckpointContext, op: Any, *_args: Any, **_kwargs: Any
    ) -> CheckpointPolicy:
        save = op in self.saved
        if op in self.every_second:
            self.matmuls[context.is_recompute] += 1
            save = self.matmuls[context.is_recompute] % 2 == 0
        if op in MATMULS:
            self.last_product = op if save else None
        elif op in SUMS:
            if save and self.last_product and not context.is_recompute:
                self._drop_product()
            self.last_product = None
        # PREFER allows the compiler to keep results that are cheaper to keep.
        return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE

    def _drop_product(self) -> None:
        """Frees the last product if it is the input of the sum over ranks: a part as wide as all.

        The compiler keeps only what backward needs.
        """
        products = self.kept[self.last_product]
        product = products[len(products) - 1].val
        if isinstance(product, DTensor) and any(p.is_partial() for p in product.placements):
            products[len(products) - 1] = _Dropped(product)


class _Dropped:
    """The layout of a freed result, in torch's list of the results that are kept."""

    def __init__(self, part: DTensor) -> None:
        self.layout = part.device_mesh, part.placements
        self.shape = part.to_local().shape
        self.empty = part.to_local().new_empty(0)

    def get_val(self, _allow_mutation: bool) -> DTensor:
        """Returns NaN: its only use is as input of the sum, which is not computed again."""
        part = self.empty.new_full(self.shape, torch.nan)
        return DTensor.from_local(part, *self.layout, run_check=False)


def _contexts(save: tuple[SavedOp, ...]) -> Any:
    """Returns the context managers of one block's forward and of its recomputation."""
    policy = SavePolicy(save)
    forward, recomputation = create_selective_checkpoint_contexts(policy)
    policy.kept = forward.storage
    return forward, recomputation


def is_checkpointed(block: nn.Module) -> bool:
    """Returns True if backward recomputes the block."""
    return isinstance(block, CheckpointWrapper)


def saved_ops(block: nn.Module) -> tuple[str, ...]:
    """Returns the operations whose results a checkpointed block keeps; () for other blocks."""
    if not isinstance(block, CheckpointWrapper):
        return ()
    context_fn = block.checkpoint_fn.keywords.get("context_fn")
    return () if context_fn is None else context_fn.args[0]


def memory_budget() -> float:
    """Returns the share of activation memory that the compiler may use; 1.0: no budget."""
    return float(compiler_config.activation_memory_budget)
