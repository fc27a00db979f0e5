"""The packages that docs/adding_a_family.md shows, run as a user would."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.models.test_families import tp_plan_violations
from titan_lite.models import registry
from titan_lite.models.patterns import matches, translate
from titan_lite.models.plan import make_plan
from titan_lite.nn.build_model import build_model

DOC = Path(__file__).parents[2] / "docs" / "adding_a_family.md"


@pytest.fixture
def tomls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    """Writes the document's files, my_pkg being importable; returns its TOML files in order."""
    text = DOC.read_text()
    (tmp_path / "my_pkg").mkdir()
    for name, code in re.findall(r"```python\n# (\S+)\n(.*?)```", text, re.DOTALL):
        (tmp_path / name).write_text(code)
    tomls = []
    for number, content in enumerate(re.findall(r"```toml\n(.*?)```", text, re.DOTALL)):
        tomls.append(tmp_path / f"{number}.toml")
        tomls[-1].write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry._FAMILIES, "data", dict(registry._FAMILIES))
    yield tomls
    for name in [name for name in sys.modules if name.split(".")[0] == "my_pkg"]:
        del sys.modules[name]


def test_another_size_is_resolved_from_the_users_module(tomls: list[Path]) -> None:
    plan = make_plan(tomls[0], world_size=1)
    assert plan.family.name == "my_llama"
    assert (plan.args.dim, plan.args.vocab_size) == (768, 128256)
    with torch.device("meta"):
        model = build_model(plan.family, plan.args)
    assert not list(tp_plan_violations(model, plan.family.tp_plan))


def test_another_form_is_built_with_a_row_for_each_parameter(tomls: list[Path]) -> None:
    plan = make_plan(tomls[1], world_size=1)
    with torch.device("meta"):
        model = build_model(plan.family, plan.args)
    assert not list(tp_plan_violations(model, plan.family.tp_plan))
    names = [name for name, _ in model.named_parameters()]
    assert len({translate(name, plan.family.hf_key_map) for name in names}) == len(names)
    assert "layers.0.attention.k_norm.weight" in names


def test_another_architecture_is_built_and_trains(tomls: list[Path]) -> None:
    plan = make_plan(tomls[2], ["--model.num_layers=2"], world_size=1)
    assert "my_pkg.my_model" not in sys.modules  # torch code waits for the build
    with torch.device("meta"):
        model = build_model(plan.family, plan.args)
    names = [name for name, _ in model.named_parameters()]
    assert not [name for name in names if "w3" in name]
    assert not list(tp_plan_violations(model, plan.family.tp_plan))
    for name in names:
        assert sum(matches(row, name) for row in plan.family.hf_key_map) == 1

    model.to_empty(device="cpu")
    for name, parameter in model.named_parameters():
        model.init_parameter(name, parameter.data, torch.Generator().manual_seed(len(name)))
    model.init_buffers("cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tokens_BS = torch.randint(plan.args.vocab_size, (2, 17))
    losses = []
    for _ in range(2):
        logits_BSV = model(tokens_BS[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits_BSV.mT, tokens_BS[:, 1:])
        loss.backward()
        assert all(p.grad is not None and p.grad.any() for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[1] < losses[0]
