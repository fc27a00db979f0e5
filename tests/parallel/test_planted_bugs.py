"""Faults put in on purpose: the comparison that the matrix passes does not let them through.

Each is planted in a case of the matrix, which shows that the case passes without it. Faults outside
experts do not change the loss of step 1: a comparison that looks no further sees none of them.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import SequenceParallel
from torch.utils._python_dispatch import TorchDispatchMode

from tests.parallel.matrix import (
    CASES,
    DEEPSEEK,
    DEEPSEEK_OVER_SEQUENCES,
    EMA,
    EP2,
    FAMILIES,
    FURTHER,
    QWEN3_MOE,
    SAVE_EXPERTS,
    TOLERANCES,
    TRACED,
    Case,
)
from tests.parallel.parity import TRAIN, Parity
from tests.runs import Run, Tensors, exceeding, slow_but
from titan_lite.nn.balance import Balance
from titan_lite.nn.moe import GroupedSwiGLU, MoE
from titan_lite.optim.ema import WeightAverage
from titan_lite.parallel import activation_checkpoint, expert, parallelize, tensor
from titan_lite.training import balancing, loss
from titan_lite.training.balancing import Balancer


def average_over_ranks() -> AbstractContextManager[Any]:
    """FSDP2's own averaging left on: gradients divided by the data-parallel degree."""
    return mock.patch.object(FSDPModule, "set_gradient_divide_factor")


def take_a_part_for_the_whole() -> AbstractContextManager[Any]:
    """Each rank's part of the hidden states' gradient, from its vocabulary, taken for the sum."""
    return mock.patch.object(loss, "Partial", Replicate)


class Unsynchronised(SequenceParallel):
    """A norm that multiplies by its weight as a plain tensor: no rank sees the others' gradient."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        module = super()._apply(module, device_mesh)

        def forward(x_BSD: DTensor) -> DTensor:
            assert isinstance(module.weight, DTensor)
            out_BSD = nn.functional.rms_norm(
                x_BSD.to_local(), module.normalized_shape, module.weight.to_local(), module.eps
            )
            return DTensor.from_local(out_BSD, device_mesh, [Shard(1)])

        module.forward = forward
        return module


def leave_norms_unsynchronised() -> AbstractContextManager[Any]:
    return mock.patch.object(tensor, "SequenceParallel", Unsynchronised)


class RoundedMatmuls(TorchDispatchMode):
    """Computes matrix products in bfloat16, and returns them in the expected dtype."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        return out.bfloat16().to(out.dtype) if op is torch.ops.aten.mm.default else out


def recompute_in_another_precision() -> AbstractContextManager[Any]:
    """Checkpointed blocks whose matrix products backward repeats in bfloat16."""
    wrap = activation_checkpoint.checkpoint_wrapper
    contexts = partial(_round_in_recomputation, ())
    return mock.patch.object(
        activation_checkpoint, "checkpoint_wrapper", partial(wrap, context_fn=contexts)
    )


def _round_in_recomputation(_saved: tuple[str, ...]) -> tuple[Any, Any]:
    return nullcontext(), RoundedMatmuls()


def move_the_average_of_one_rank() -> AbstractContextManager[Any]:
    """An average of the weights that only rank 0 updates in its shards."""
    update = WeightAverage.update

    def update_on_rank_0(self: WeightAverage, step: int, is_applied: torch.Tensor) -> None:
        if dist.get_rank() == 0:
            update(self, step, is_applied)

    return mock.patch.object(WeightAverage, "update", update_on_rank_0)


def weigh_in_backward(tensor: Tensor, factor: float) -> Tensor:
    """Returns the tensor, whose gradient is multiplied by the factor."""
    return factor * tensor - (factor - 1) * tensor.detach()


def divide_the_experts_gradient() -> AbstractContextManager[Any]:
    """Gradients of experts averaged over the ranks that share them."""
    forward = GroupedSwiGLU.forward

    def divided(self: GroupedSwiGLU, x_RD: Tensor, ends_E: Tensor, *weights: Tensor) -> Tensor:
        return forward(self, x_RD, ends_E, *(weigh_in_backward(w, 0.5) for w in weights))

    return mock.patch.object(GroupedSwiGLU, "forward", divided)


def train_with(
    plant: Callable[[], AbstractContextManager[Any]],
    folder: Path,
    *overrides: str,
    weights: Mapping[int, Tensors],
) -> Run:
    with plant():
        return TRAIN(folder, *overrides, weights=weights)


GRADIENTS = {name for name in TOLERANCES if name.startswith("gradients")}
SHARED = Case("dp2", "full", micro_batches=4, more=(EP2,), alike=QWEN3_MOE)
ONE_GRAPH = Case("dp2", "selective_op", TRACED, more=(EP2, SAVE_EXPERTS), alike=QWEN3_MOE)
# Fault, the case of the matrix it is planted in, what catches it, and the worst gradient of step 1.
PLANTED = (
    # Adam divides a gradient by its size: not one of the losses moves.
    (average_over_ranks, Case("dp2", "selective_op"), {"grad_norm", *GRADIENTS}, "weight"),
    (take_a_part_for_the_whole, Case("tp2"), {"loss", "grad_norm", *GRADIENTS}, "norm.weight"),
    (leave_norms_unsynchronised, Case("tp2"), {"loss", "grad_norm", *GRADIENTS}, "norm.weight"),
    (divide_the_experts_gradient, SHARED, {"grad_norm", *GRADIENTS}, "experts"),
    (divide_the_experts_gradient, ONE_GRAPH, {"grad_norm", *GRADIENTS}, "experts"),
    # Rounding turns gradients a little, and neither lengthens nor shortens them.
    (recompute_in_another_precision, Case("dp2", "full", micro_batches=4), GRADIENTS, "layers."),
    # Only validation reads the average.
    (move_the_average_of_one_rank, Case("dp2", alike=EMA), {"loss"}, ""),
)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("plant", "case", "caught_by", "worst"),
    slow_but(PLANTED[:1], PLANTED),
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_planted_fault_is_caught_and_the_loss_of_step_1_does_not_show_it(
    plant: Callable[[], AbstractContextManager[Any]],
    case: Case,
    caught_by: set[str],
    worst: str,
    parity: Parity,
) -> None:
    assert case in (*CASES, *FURTHER, *FAMILIES)
    actual = parity.deviations(case, partial(train_with, plant))
    assert actual["loss of step 1"][0] <= TOLERANCES["loss"]
    assert exceeding(actual, TOLERANCES).keys() == caught_by
    assert worst in actual["gradients of step 1"][1]


# Faults of experts, in the layouts that they are for.


def multiply_the_routers_gradient() -> AbstractContextManager[Any]:
    """The gradient of the router's weights multiplied by the experts of a token."""
    forward = Balance.forward

    def multiplied(self: Balance, weights_TK: Tensor, *rest: Any) -> Tensor:
        return forward(self, weigh_in_backward(weights_TK, 2), *rest)

    return mock.patch.object(Balance, "forward", multiplied)


def reverse_the_experts_of_a_rank() -> AbstractContextManager[Any]:
    """The experts of one rank in another order than the router's."""
    forward = GroupedSwiGLU.forward

    def reversed_(self: GroupedSwiGLU, x_RD: Tensor, ends_E: Tensor, *weights: Tensor) -> Tensor:
        if dist.get_rank():
            weights = tuple(weight.flip(0) for weight in weights)
        return forward(self, x_RD, ends_E, *weights)

    return mock.patch.object(GroupedSwiGLU, "forward", reversed_)


class Untaken:
    """Rows as they arrived."""

    @staticmethod
    def apply(x: Tensor, _rows: Tensor, _places: Tensor) -> Tensor:
        return x


def compute_rows_as_they_arrive() -> AbstractContextManager[Any]:
    """Rows of several ranks not sorted by expert."""
    return mock.patch.object(expert, "Take", Untaken)


def add_shared_experts_on_each_rank() -> AbstractContextManager[Any]:
    """The output of shared experts added once for each tensor-parallel rank."""
    forward = MoE.forward

    def added(self: MoE, x_BSD: Tensor) -> Tensor:
        assert self.shared is not None
        out_BSD: Tensor = forward(self, x_BSD) + self.shared(x_BSD)
        return out_BSD

    return mock.patch.object(MoE, "forward", added)


def leave_a_ranks_gradient_of_copies() -> AbstractContextManager[Any]:
    """The router's gradient from one rank's tokens, and the latent keys' from one rank's heads."""
    return mock.patch.object(tensor, "Partial", Replicate)


def balance_by_the_counts_of_a_rank() -> AbstractContextManager[Any]:
    """Biases and loads that follow from the tokens of each rank alone."""
    return mock.patch.object(balancing, "dist", mock.Mock())


def average_the_balancing_loss() -> AbstractContextManager[Any]:
    """The balancing loss divided by the number of ranks."""
    start_step = Balancer.start_step

    def averaged(self: Balancer, loss_scale: Tensor | None) -> None:
        start_step(self, loss_scale)
        for router in self.routers.values():
            router.balance.token_weight.div_(dist.get_world_size())

    return mock.patch.object(Balancer, "start_step", averaged)


def count_parts_of_sequences() -> AbstractContextManager[Any]:
    """The loads in a rank's part of each sequence taken for those of the sequence."""
    return mock.patch.object(parallelize, "apply_whole_counts")


SPLIT = Case("tp2", micro_batches=2, alike=(*DEEPSEEK, "training.steps=10"))
PLANTED_IN_EXPERTS = (
    (multiply_the_routers_gradient, SHARED),
    (reverse_the_experts_of_a_rank, SHARED),
    (compute_rows_as_they_arrive, SHARED),
    (average_the_balancing_loss, SHARED),
    (multiply_the_routers_gradient, ONE_GRAPH),
    (reverse_the_experts_of_a_rank, ONE_GRAPH),
    (add_shared_experts_on_each_rank, SPLIT),
    (leave_a_ranks_gradient_of_copies, SPLIT),
    (balance_by_the_counts_of_a_rank, SPLIT),
    (count_parts_of_sequences, Case("cp2", alike=DEEPSEEK_OVER_SEQUENCES)),
)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("plant", "case"),
    slow_but(PLANTED_IN_EXPERTS[:1], PLANTED_IN_EXPERTS),
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_fault_planted_in_experts_is_caught_by_their_loads(
    plant: Callable[[], AbstractContextManager[Any]], case: Case, parity: Parity
) -> None:
    assert case in FAMILIES
    with pytest.raises(AssertionError, match="moe/entropy_per_layer"):
        parity.deviations(case, partial(train_with, plant))
