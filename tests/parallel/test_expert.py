"""Experts of two ranks, under routing that is forced: one process gives the same."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from tests.distributed import Workers
from titan_lite.models.args import MoEArgs
from titan_lite.models.moe import MIXTRAL
from titan_lite.nn import moe as moe_module
from titan_lite.nn.moe import MoE
from titan_lite.parallel import row_exchange
from titan_lite.parallel.compile import Compilations
from titan_lite.parallel.expert import apply_ep
from titan_lite.runtime.readback import Readback

D, E = 64, 8
DEBUG = MIXTRAL.flavors["debug"]
assert isinstance(DEBUG, MoEArgs)
ARGS = replace(DEBUG, dim=D, ffn_dim=32, num_experts=E, route_bias=True)
BOUND = 1e-6


@dataclass(frozen=True)
class Forced:
    """Tokens of each rank, and the biases, or the equal scores, that route them.

    counts: tokens of the first experts, if they are forced.
    """

    tokens: tuple[int, int] = (6, 6)
    top_k: int = 2
    biases: dict[int, float] = field(default_factory=dict)
    is_tied: bool = False
    counts: tuple[int, ...] = ()


FORCED = {
    "all tokens to an expert of the first rank": Forced(top_k=1, biases={0: 9}, counts=(12,)),
    "all tokens to an expert of the last rank": Forced(
        top_k=1, biases={7: 9}, counts=(0, 0, 0, 0, 0, 0, 0, 12)
    ),
    "an expert without tokens": Forced(biases={0: -9}, counts=(0,)),
    "fewer tokens than experts": Forced((1, 1)),
    "one token and many": Forced((1, 11)),
    "exact ties": Forced(is_tied=True, counts=(12, 12, 0, 0, 0, 0, 0, 0)),
}


def _block(forced: Forced) -> MoE:
    generator = torch.Generator().manual_seed(0)
    moe = MoE(replace(ARGS, top_k=forced.top_k))
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    if forced.is_tied:
        torch.nn.init.zeros_(moe.router.weight)
    assert moe.router.bias is not None
    for number, bias in forced.biases.items():
        moe.router.bias[number] = bias
    return moe


def _backward(moe: MoE, forced: Forced, tokens: slice) -> dict[str, Any]:
    """Returns the output and the gradients of a loss over some of the tokens, and the counts."""
    generator = torch.Generator().manual_seed(1)
    shape = sum(forced.tokens), D
    x_TD, weights_TD = (torch.randn(shape, generator=generator)[tokens] for _ in range(2))
    x_TD.requires_grad_()
    out_TD = moe(x_TD.unsqueeze(0))[0]
    (out_TD * weights_TD).sum().backward()
    grads = {name: p.grad for name, p in moe.named_parameters()} | {"x": x_TD.grad}
    assert all(grad is not None for grad in grads.values())
    tensors = grads | {"out": out_TD.detach(), "counts": moe.router.balance.counts_E}
    return {name: _whole(tensor) for name, tensor in tensors.items() if tensor is not None}


@pytest.mark.distributed
def test_one_graph_serves_all_numbers_of_rows(workers: Mapping[int, Workers]) -> None:
    assert workers[2].run(_graphs_of_all_routings) == [1, 1]


def _graphs_of_all_routings() -> int:
    torch.compiler.reset()
    compilations = Compilations()
    moe = MoE(ARGS)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter)
    apply_ep(moe, init_device_mesh("cpu", (2,), mesh_dim_names=("ep",)))  # type: ignore[arg-type]
    moe.compile(fullgraph=True, backend="aot_eager")
    assert moe.router.bias is not None
    for forced in FORCED.values():
        moe.router.bias.zero_()
        for number, bias in forced.biases.items():
            moe.router.bias[number] = bias
        moe(torch.randn(1, 4, D)).sum().backward()
    return compilations.graphs


@pytest.mark.distributed
def test_the_host_waits_for_the_numbers_of_rows_after_it_started_what_needs_none(
    workers: Mapping[int, Workers],
) -> None:
    order = ["numbers of rows sent", "rows sorted", "shared expert", "numbers of rows read"]
    assert workers[2].run(_order_of_a_forward) == [order, order]


def _order_of_a_forward() -> list[str]:
    order: list[str] = []

    class Logged(Readback):
        def __init__(self, tensor: Tensor) -> None:
            order.append("numbers of rows sent")
            super().__init__(tensor)

        def read(self) -> list[Any]:
            order.append("numbers of rows read")
            return super().read()

    class Shared(torch.nn.Identity):
        def forward(self, input: Tensor) -> Tensor:
            order.append("shared expert")
            return input

    take = moe_module.Take.apply

    class Sorting:
        @staticmethod
        def apply(*arguments: Tensor) -> Any:
            if "rows sorted" not in order:
                order.append("rows sorted")
            return take(*arguments)

    moe = MoE(ARGS, Shared())
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter)
    apply_ep(moe, init_device_mesh("cpu", (2,), mesh_dim_names=("ep",)))  # type: ignore[arg-type]
    with (
        mock.patch.object(row_exchange, "Readback", Logged),
        mock.patch.object(moe_module, "Take", Sorting),
    ):
        moe(torch.ones(1, 4, D))
    return order


def _whole(tensor: Tensor) -> Any:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).numpy()


def _on_a_rank(forced: Forced, is_compiled: bool) -> dict[str, Any]:
    first = sum(forced.tokens[: dist.get_rank()])
    moe = _block(forced)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("ep",))
    apply_ep(moe, mesh)  # type: ignore[arg-type]
    if is_compiled:
        torch.compiler.reset()
        moe.compile(fullgraph=True, backend="aot_eager")
    return _backward(moe, forced, slice(first, first + forced.tokens[dist.get_rank()]))


@pytest.mark.distributed
@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("name", FORCED)
def test_two_ranks_route_as_one_process_does(
    name: str, is_compiled: bool, workers: Mapping[int, Workers]
) -> None:
    forced = FORCED[name]
    expected = _backward(_block(forced), forced, slice(None))
    assert expected["counts"][: len(forced.counts)].tolist() == list(forced.counts)
    first, second = workers[2].run(_on_a_rank, forced, is_compiled)
    for key, whole in expected.items():
        if key in ("x", "out"):
            actual = torch.cat([torch.from_numpy(rank[key]) for rank in (first, second)])
        elif key.startswith("experts"):
            actual = torch.from_numpy(first[key])
        else:
            actual = torch.from_numpy(first[key] + second[key])
        reference = torch.from_numpy(whole)
        assert actual.shape == reference.shape, key
        error = (actual - reference).abs().max() / reference.abs().max().clamp(min=1e-3)
        assert error <= (0 if key == "counts" else BOUND), (key, error)
