"""Router and experts: against transformers' blocks, and where tokens are routed unevenly."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from titan_lite.models.args import MoEArgs
from titan_lite.models.moe import MIXTRAL
from titan_lite.nn.moe import MoE

D, H, E, K, T = 64, 32, 8, 2, 96
DEBUG = MIXTRAL.flavors["debug"]
assert isinstance(DEBUG, MoEArgs)
ARGS = replace(DEBUG, dim=D, ffn_dim=H, num_experts=E, top_k=K)


def drawn(args: MoEArgs = ARGS) -> MoE:
    torch.manual_seed(0)
    moe = MoE(args)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return moe


def qwen(args: MoEArgs) -> Any:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    return Qwen3MoeSparseMoeBlock(
        Qwen3MoeConfig(
            hidden_size=D,
            moe_intermediate_size=H,
            num_experts=E,
            num_experts_per_tok=args.top_k,
            norm_topk_prob=args.route_norm,
        )
    )


def mixtral(args: MoEArgs) -> Any:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    return MixtralSparseMoeBlock(
        MixtralConfig(
            hidden_size=D,
            intermediate_size=H,
            num_local_experts=E,
            num_experts_per_tok=args.top_k,
        )
    )


@pytest.mark.parametrize(
    ("reference_of", "args"),
    [
        (qwen, ARGS),
        (qwen, replace(ARGS, route_norm=False, top_k=1)),
        (qwen, replace(ARGS, route_norm=False, top_k=5)),
        (mixtral, ARGS),
    ],
)
def test_output_and_every_gradient_equal_transformers_block(
    reference_of: Any, args: MoEArgs
) -> None:
    pytest.importorskip("transformers")
    moe, reference = drawn(args), reference_of(args)
    pairs = {
        reference.gate.weight: lambda: moe.router.weight,
        reference.experts.gate_up_proj: lambda: torch.cat([moe.experts.w1, moe.experts.w3], 1),
        reference.experts.down_proj: lambda: moe.experts.w2,
    }
    for parameter, value in pairs.items():
        parameter.data.copy_(value().detach())
    x, cotangent = torch.randn(2, 1, T // 2, D)
    mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    got, expected = moe(mine), reference(other)
    (got * cotangent).sum().backward()
    (expected * cotangent).sum().backward()
    for parameter in moe.parameters():
        parameter.data = parameter.grad
    close(got, expected)
    close(mine.grad, other.grad)
    for parameter, gradient in pairs.items():
        close(gradient(), parameter.grad)


def close(got: Tensor | None, expected: Tensor | None) -> None:
    assert got is not None
    assert expected is not None
    assert (got - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_of_equal_experts_the_first_are_chosen() -> None:
    moe = drawn()
    torch.nn.init.zeros_(moe.router.weight)
    weights, chosen = moe.router(torch.randn(1, T, D))
    assert torch.equal(chosen, torch.arange(K).expand(T, K))
    assert torch.equal(weights, torch.full((T, K), 1 / K))


@pytest.mark.parametrize("biased", [False, True])
def test_experts_are_chosen_from_the_groups_with_the_best_two(biased: bool) -> None:
    """Expert 0 is the best of all, but its group has no second one."""
    args = replace(ARGS, score="sigmoid", groups=4, kept_groups=2, route_scale=2.0, route_bias=True)
    router = drawn(args).router
    logits = torch.tensor([3.0, -9.0, 1.0, 1.0, 2.0, -1.0, 0.5, 1.5])
    router.weight.data = torch.zeros(E, D)
    router.weight.data[:, 0] = 0 if biased else logits
    assert router.bias is not None
    # Zero logits are scores of 0.5 each, and the bias makes them those of the other case.
    router.bias += (logits.sigmoid() - 0.5) if biased else 0
    weights, chosen = router(torch.ones(1, 1, D))
    assert chosen.tolist() == [[7, 2]]
    scores = torch.full((2,), 0.5) if biased else logits.sigmoid()[[7, 2]]
    assert torch.allclose(weights, 2 * scores / scores.sum())


def test_of_equal_groups_the_first_are_kept() -> None:
    router = drawn(replace(ARGS, score="sigmoid", groups=4, kept_groups=2, top_k=4)).router
    torch.nn.init.zeros_(router.weight)
    _, chosen = router(torch.randn(1, T, D))
    assert torch.equal(chosen, torch.arange(4).expand(T, 4))


def test_sigmoids_that_are_all_zero_give_finite_weights_and_gradients() -> None:
    args = replace(ARGS, score="sigmoid", balance_loss="sequence", balance_coeff=1.0)
    router = drawn(args).router
    router.balance.token_weight.fill_(1)
    router.weight.data = torch.full((E, D), -1000.0)
    weights, _ = router(torch.ones(1, T, D))
    weights.sum().backward()
    assert weights.isfinite().all()
    assert router.weight.grad is not None
    assert router.weight.grad.isfinite().all()


@pytest.mark.parametrize("num_tokens", [1, T])
def test_an_expert_without_tokens_has_a_gradient_of_zero(num_tokens: int) -> None:
    moe = drawn(replace(ARGS, top_k=1, route_norm=False))
    # All tokens are equal, and go to one expert.
    x = torch.randn(D).expand(1, num_tokens, D)
    out = moe(x)
    # The gradient of a sum is expanded, with strides of 0.
    out.sum().backward()
    _, ((chosen,),) = moe.router(x[:, :1])
    for weight in moe.experts.parameters():
        assert weight.grad is not None
        used = weight.grad.flatten(1).any(1)
        assert used.tolist() == [expert == chosen for expert in range(E)]


def test_the_matmuls_of_all_experts_are_counted_also_on_fake_float32_tensors() -> None:
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        moe = MoE(ARGS)
        moe(torch.randn(1, T, D, requires_grad=True)).sum().backward()
    # Three weights and the router; of each, forward and two gradients.
    assert counter.get_total_flops() == 3 * 2 * T * (K * 3 * D * H + D * E)


def test_the_same_bits_come_out_of_every_run() -> None:
    def run() -> list[Tensor]:
        moe = drawn()
        x = torch.randn(4, T, D, requires_grad=True)
        out = moe(x)
        out.square().sum().backward()
        return [out, *(p.grad for p in (x, *moe.parameters()) if p.grad is not None)]

    assert all(map(torch.equal, run(), run()))
