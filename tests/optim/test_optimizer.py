"""Parameter groups and settings of the optimizers, against torch.optim."""

import pytest
import torch
from torch import nn

from titan_lite.config.schema import Optimizer
from titan_lite.optim.optimizer import build_optimizer, set_lr


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(4, 3)
        self.norm = nn.RMSNorm(3)
        self.output = nn.Linear(3, 2)


def test_norms_and_biases_are_not_decayed() -> None:
    model = _Model()
    decayed, kept = build_optimizer(model, Optimizer(weight_decay=0.5)).param_groups
    assert decayed["weight_decay"] == 0.5
    assert [id(p) for p in decayed["params"]] == [
        id(model.tok_embeddings.weight),
        id(model.output.weight),
    ]
    assert kept["weight_decay"] == 0
    assert [id(p) for p in kept["params"]] == [id(model.norm.weight), id(model.output.bias)]


def test_no_group_is_empty() -> None:
    assert len(build_optimizer(_Model(), Optimizer(no_decay=[])).param_groups) == 1
    (kept,) = build_optimizer(nn.RMSNorm(3), Optimizer()).param_groups
    assert kept["weight_decay"] == 0


def test_embeddings_are_not_decayed_when_no_decay_names_them() -> None:
    model = _Model()
    _, kept = build_optimizer(model, Optimizer(no_decay=["embedding"])).param_groups
    assert [id(p) for p in kept["params"]] == [id(model.tok_embeddings.weight)]


@pytest.mark.parametrize("name", ["AdamW", "Adam"])
@pytest.mark.parametrize("implementation", ["auto", "fused", "foreach", "for-loop"])
def test_each_implementation_takes_the_step_of_torch_optim(name: str, implementation: str) -> None:
    torch.manual_seed(0)
    model, reference = _Model(), _Model()
    reference.load_state_dict(model.state_dict())
    section = Optimizer(
        name=name, implementation=implementation, lr=0.1, no_decay=[], weight_decay=0.2
    )
    ours = build_optimizer(model, section)
    theirs = getattr(torch.optim, name)(
        reference.parameters(), lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.2, foreach=False
    )
    for net, optimizer in ((model, ours), (reference, theirs)):
        for _ in range(3):
            net.output(net.norm(net.tok_embeddings.weight)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(model.state_dict(), reference.state_dict())
    fused = implementation in ("auto", "fused")
    assert ours.param_groups[0]["fused"] == fused


def test_set_lr_reaches_every_group() -> None:
    optimizer = build_optimizer(_Model(), Optimizer())
    set_lr(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]
