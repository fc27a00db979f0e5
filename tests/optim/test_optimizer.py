"""Parameters and settings of the optimizers, against torch.optim."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from titan_lite.config.optimizers import OPTIMIZERS, Adam, AdamW, Optimizer, OptimizerGroup
from titan_lite.config.problems import SettingError
from titan_lite.config.schema import EMA
from titan_lite.models.bert import MEGATRON_BERT
from titan_lite.models.llama import LLAMA
from titan_lite.models.plan import make_plan
from titan_lite.models.roles import PlanRow, kind_of
from titan_lite.nn.build_model import build_model
from titan_lite.optim.optimizer import (
    OptimizerContext,
    build_optimizer,
    check_groups,
    parameters_of,
    set_lr,
)
from titan_lite.training.meta_model import build_checked_model

PAGE = Path(__file__).parents[2] / "docs" / "optimizers.md"
PLAN = LLAMA.tp_plan
CONTEXT = OptimizerContext(ranks=None, param_dtype=torch.float32, args=LLAMA.flavors["debug"])


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(4, 3)
        self.norm = nn.RMSNorm(3)
        self.output = nn.Linear(3, 2)


def build_one(model: nn.Module, section: Optimizer) -> torch.optim.Optimizer:
    return build_optimizer(model, section, PLAN, CONTEXT)


def decays(section: Optimizer, **settings: Any) -> dict[str, float]:
    settings = {"tied_head": False, **settings}
    actual = parameters_of(_Model(), section, PLAN, **settings)
    return {parameter.name: parameter.weight_decay for parameter in actual}


def test_parameters_that_no_decay_names_are_not_decayed() -> None:
    assert decays(AdamW(weight_decay=0.5)) == {
        "tok_embeddings.weight": 0.5,
        "norm.weight": 0,
        "output.weight": 0.5,
        "output.bias": 0,
    }
    assert decays(AdamW(no_decay=["embedding"]))["tok_embeddings.weight"] == 0
    kept, decayed = build_one(_Model(), AdamW(no_decay=["embedding"])).param_groups
    assert [len(group["params"]) for group in (kept, decayed)] == [1, 3]
    assert [group["weight_decay"] for group in (kept, decayed)] == [0, 0.1]


def test_the_page_of_optimizers_names_every_key() -> None:
    keys = {*OPTIMIZERS.fields, *OptimizerGroup.model_fields, *EMA.model_fields}
    named = set(re.findall(r"`(?:[a-z]+\.)?(\w+)", PAGE.read_text()))
    assert keys - named == set()


def test_no_group_is_empty() -> None:
    assert len(build_one(_Model(), AdamW(no_decay=[])).param_groups) == 1
    (kept,) = build_one(nn.RMSNorm(3), AdamW()).param_groups
    assert kept["weight_decay"] == 0


def test_the_first_group_that_matches_sets_rate_and_decay() -> None:
    groups = [
        OptimizerGroup(pattern="output.*", lr_factor=0.5),
        OptimizerGroup(pattern="*.weight", weight_decay=0.25),
    ]
    model = _Model()
    optimizer = build_one(model, AdamW(groups=groups))
    set_lr(optimizer, 2.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    settings = {
        names[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert settings == {
        "tok_embeddings.weight": (2, 0.25),
        "norm.weight": (2, 0.25),
        "output.weight": (1, 0.1),
        "output.bias": (1, 0),
    }


def test_the_copy_on_the_last_stage_of_a_tied_embedding_is_stepped_as_the_embedding() -> None:
    section = AdamW(no_decay=["embedding"], groups=[OptimizerGroup(pattern="tok_*", lr_factor=3)])
    stage = _Model()
    stage.tok_embeddings = None  # type: ignore[assignment]
    actual = list(parameters_of(stage, section, PLAN, tied_head=True))
    (copy,) = [parameter for parameter in actual if parameter.tensor is stage.output.weight]
    assert (copy.name, copy.kind) == ("tok_embeddings.weight", "embedding")
    assert (copy.weight_decay, copy.lr_factor) == (0, 3)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["outputs.*"], 'table 1: "outputs.*" matches no parameter; the model has a.weight to'),
        (["output.weigth"], 'did you mean "output.weight"?'),
        (["*", "a.*"], 'table 2: "a.*" matches only parameters of earlier tables; put it before'),
    ],
)
def test_a_group_without_parameters_is_refused(patterns: list[str], message: str) -> None:
    section = AdamW(groups=[OptimizerGroup(pattern=pattern) for pattern in patterns])
    with pytest.raises(SettingError) as error:
        check_groups(section, ["a.weight", "output.weight"])
    assert message in error.value.message


def test_groups_are_checked_before_a_run_starts() -> None:
    plan = make_plan(None, ['--optimizer.groups=[{pattern="layers.9.*"}]'], world_size=1)
    with pytest.raises(SettingError, match=r"table 1: .* matches no parameter"):
        build_checked_model(plan)


def test_kinds_follow_from_the_roles_of_the_family() -> None:
    args = MEGATRON_BERT.flavors["debug"]
    with torch.device("meta"):
        model = build_model(MEGATRON_BERT, args)
    kinds: dict[str, set[str]] = {}
    actual = parameters_of(model, AdamW(), MEGATRON_BERT.tp_plan, tied_head=args.tied_head)
    for parameter in actual:
        kinds.setdefault(parameter.kind, set()).add(parameter.name.replace("layers.0.", ""))
    assert kinds["embedding"] == {f"{table}_embeddings.weight" for table in ("tok", "pos", "type")}
    assert kinds["head"] == {
        "transform.dense.weight",
        "pair_head.pooler.weight",
        "pair_head.classifier.weight",
    }
    of_block = {name for name in kinds["matrix"] if not name.startswith("layers.")}
    assert of_block == {
        *(f"attention.w{letter}.weight" for letter in "qkvo"),
        "feed_forward.w1.weight",
        "feed_forward.w2.weight",
    }
    assert all("norm" in name or name.endswith("bias") for name in kinds["vector"])
    moe = (PlanRow("moe.router", "router"), PlanRow("moe.experts", "expert"))
    assert [kind_of(name, moe) for name in ("moe.router.weight", "moe.experts.w1")] == [
        "router",
        "expert",
    ]


@pytest.mark.parametrize("section", [AdamW, Adam])
@pytest.mark.parametrize("implementation", ["auto", "fused", "foreach", "for-loop"])
def test_each_implementation_takes_the_step_of_torch_optim(
    section: Any, implementation: str
) -> None:
    torch.manual_seed(0)
    model, reference = _Model(), _Model()
    reference.load_state_dict(model.state_dict())
    settings = section(implementation=implementation, lr=0.1, no_decay=[], weight_decay=0.2)
    local = build_one(model, settings)
    peer = getattr(torch.optim, settings.name)(
        reference.parameters(), lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.2, foreach=False
    )
    for net, optimizer in ((model, local), (reference, peer)):
        for _ in range(3):
            net.output(net.norm(net.tok_embeddings.weight)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(model.state_dict(), reference.state_dict())
    fused = implementation in ("auto", "fused")
    assert local.param_groups[0]["fused"] == fused


@pytest.mark.parametrize("section", [AdamW, Adam])
def test_the_state_is_there_before_the_first_step_and_counts_no_step(section: Any) -> None:
    model = _Model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = build_one(model, section())
    assert {len(optimizer.state[parameter]) for parameter in model.parameters()} == {3}
    assert not any(value.any() for state in optimizer.state.values() for value in state.values())
    assert all((before[name] == tensor).all() for name, tensor in model.state_dict().items())
    assert {group["lr"] for group in optimizer.param_groups} == {3e-4}
