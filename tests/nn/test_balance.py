"""Balancing losses and counts of one block."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from titan_lite.models.args import MoEArgs
from titan_lite.models.moe import MIXTRAL
from titan_lite.nn.moe import MoE

D, E, K, B, S = 32, 8, 3, 4, 24
DEBUG = MIXTRAL.flavors["debug"]
assert isinstance(DEBUG, MoEArgs)
ARGS = replace(DEBUG, dim=D, ffn_dim=16, num_experts=E, top_k=K)


def drawn(**changes: Any) -> MoE:
    torch.manual_seed(0)
    moe = MoE(replace(ARGS, **changes))
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    moe.router.balance.token_weight.fill_(1 / (B * S))
    return moe


def inputs() -> Tensor:
    return torch.randn(B, S, D, generator=torch.Generator().manual_seed(1))


def gradient(moe: MoE, call: Callable[..., Tensor] | None = None) -> Tensor:
    (call or moe)(inputs()).square().mean().backward()
    assert moe.router.weight.grad is not None
    return moe.router.weight.grad


def written_out(kind: str, shares_BSE: Tensor, chosen: Tensor, previous_load_E: Tensor) -> Tensor:
    """The sequence-wise loss of arXiv:2412.19437, one sequence at a time."""
    total = shares_BSE.new_zeros(())
    for shares_SE, chosen_SK in zip(shares_BSE, chosen.view(B, S, K), strict=True):
        counts = torch.tensor([(chosen_SK == expert).sum() for expert in range(E)])
        load_E = counts * E / (K * S) if kind == "sequence" else previous_load_E
        total = total + (load_E * shares_SE.mean(0)).sum() / B
    return total


@pytest.mark.parametrize("kind", ["sequence", "global_lagged"])
def test_the_gradient_is_that_of_the_written_out_loss(kind: str) -> None:
    previous_load_E = torch.rand(E, generator=torch.Generator().manual_seed(2))
    plain, balanced = drawn(), drawn(balance_loss=kind, balance_coeff=0.5, z_loss_coeff=0.25)
    balanced.router.balance.previous_load_E.copy_(previous_load_E)
    without = gradient(plain)
    plain.router.weight.grad = None
    logits = inputs() @ plain.router.weight.T
    _, chosen = plain.router(inputs())
    loss = 0.5 * written_out(kind, logits.softmax(-1), chosen, previous_load_E)
    loss = loss + 0.25 * logits.logsumexp(-1).square().mean()
    loss.backward()
    assert plain.router.weight.grad is not None
    expected = without + plain.router.weight.grad
    got = gradient(balanced)
    assert (got - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert (got - without).abs().max() > 1e-3 * expected.abs().max()
    assert balanced.router.balance.loss.item() == pytest.approx(loss.item(), rel=1e-6)


def test_each_token_is_counted_once_whatever_is_computed_again_and_never_without_gradients() -> (
    None
):
    moe = drawn()
    balance = moe.router.balance
    _, chosen = moe.router(inputs())
    once = torch.bincount(chosen.flatten(), minlength=E)
    with torch.no_grad():
        moe(inputs())
    assert not balance.counts_E.any()
    gradient(moe)
    assert torch.equal(balance.counts_E, once)
    gradient(moe, lambda x: checkpoint(moe, x, use_reentrant=False))
    assert torch.equal(balance.counts_E, 2 * once)
    balance.clear()
    assert not balance.counts_E.any()


def test_the_bias_chooses_and_does_not_weigh() -> None:
    plain, biased = drawn(route_norm=False), drawn(route_norm=False, route_bias=True)
    assert biased.router.bias is not None
    biased.router.bias[3] = 100.0
    weights, chosen = biased.router(inputs())
    assert (chosen[:, 0] == 3).all()
    scores = (inputs().flatten(0, 1) @ plain.router.weight.T).softmax(-1)
    assert torch.allclose(weights, scores.gather(1, chosen))
