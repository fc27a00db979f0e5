"""Optimizers of plugins take the steps of torch.optim, and resume with its state."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.distributed import Workers
from tests.runs import Tensors, build_trainer, gather
from titan_lite.config.optimizers import BUILDERS, OPTIMIZERS, AdamW
from titan_lite.models.llama import LLAMA
from titan_lite.optim.nonfinite import NonFiniteGuard
from titan_lite.optim.optimizer import OptimizerContext, build_optimizer, set_lr

MOMENTUM = {"momentum": 0.9}
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {}),
    ("SGD", MOMENTUM),
    ("SGD", {**MOMENTUM, "dampening": 0.5}),
    ("SGD", {**MOMENTUM, "nesterov": True}),
    ("Adam", {"amsgrad": True}),
    ("AdamW", {}),
    ("AdamW", {"amsgrad": True, "fused": True}),
    ("NAdam", {}),
    ("NAdam", {"decoupled_weight_decay": True, "foreach": False}),
    ("RAdam", {}),
    ("Adamax", {}),
    ("Adadelta", {}),
    ("Adagrad", {"initial_accumulator_value": 0.1}),
    ("Adafactor", {}),
    ("ASGD", {}),
    ("ASGD", {"foreach": False, "t0": 1}),
    ("RMSprop", {}),
    ("RMSprop", {**MOMENTUM, "centered": True}),
    ("Rprop", {}),
    pytest.param(
        *("Muon", {}),
        marks=pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="a newer torch"),
    ),
]


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(4, 3)
        self.output = nn.Linear(3, 2, bias=False)

    def forward(self) -> Tensor:
        return (self.output(self.tok_embeddings.weight) - 1).square().sum()


@pytest.fixture
def plugin() -> Iterator[Any]:
    """The module tests.optim.torch_plugin, registered for one test."""
    from tests.optim import torch_plugin

    torch_plugin.register_optimizer(torch_plugin.TorchOptimizer, "tests.optim.torch_plugin:build")
    yield torch_plugin
    del BUILDERS["torch"], OPTIMIZERS.variants["torch"]
    # Merges the keys again.
    OPTIMIZERS.add(AdamW)


@pytest.mark.parametrize(("kind", "settings"), KINDS)
def test_steps_are_those_of_torch_optim_also_after_one_that_is_skipped(
    plugin: Any, kind: str, settings: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    model, reference = _Model(), _Model()
    reference.load_state_dict(model.state_dict())
    section = plugin.TorchOptimizer(kind=kind, settings=settings, weight_decay=0.2)
    context = OptimizerContext(ranks=None, param_dtype=torch.float32, args=LLAMA.flavors["debug"])
    optimizer = build_optimizer(model, section, LLAMA.tp_plan, context)
    decay = {} if kind == "Rprop" else {"weight_decay": 0.2}
    peer = getattr(torch.optim, kind)(reference.parameters(), lr=section.lr, **decay, **settings)
    guard = NonFiniteGuard("skip", torch.device("cpu"))
    for lr, is_finite in ((0.1, False), (0.05, True), (0.1, True), (0.1, False), (0.02, True)):
        model().backward()
        set_lr(optimizer, lr)
        norms = torch.ones(2) if is_finite else torch.full((2,), torch.nan)
        if not is_finite:
            model.output.weight.grad = torch.full_like(model.output.weight, torch.nan)
        guard.step(
            optimizer, is_finite=torch.tensor(is_finite), divisor=None, norms=norms, owners="ab"
        )
        optimizer.zero_grad()
        if is_finite:
            reference().backward()
            set_lr(peer, lr)
            peer.step()
            peer.zero_grad()
        for weight, expected in zip(model.parameters(), reference.parameters(), strict=True):
            assert torch.equal(weight, expected)


RUN = (
    "--job.plugins=['tests.optim.torch_plugin']",
    "--optimizer.name=torch",
    "--checkpoint.enable=true",
    "--checkpoint.interval=100",
    "--training.nonfinite=skip",
    "--lr_scheduler.warmup_steps=0",
    "--training.local_batch_size=4",
)


def _train(folder: Path, last: int, skipped: int, *overrides: str) -> Tensors:
    """Weights after step `last`; the steps up to `skipped` are not applied. Saves at the end."""
    trainer = build_trainer(folder, *RUN, *overrides)
    guard = trainer.built.train_step.guard
    is_finite = guard.is_finite
    with contextlib.closing(trainer):
        for step in range(trainer.state.step + 1, last + 1):
            if step <= skipped:
                guard.is_finite = lambda *_: torch.tensor(False)  # type: ignore[method-assign]
            else:
                guard.is_finite = is_finite  # type: ignore[method-assign]
            trainer.train_step(step)
        trainer.save()
        return gather(trainer)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("kind", "settings", "world_size", "saved_at", "skipped"),
    [
        ("NAdam", "{}", 1, 2, 0),
        ("NAdam", "{}", 2, 2, 2),
        ("ASGD", "{t0 = 1.0}", 1, 2, 0),
        ("SGD", "{momentum = 0.9, dampening = 0.5}", 2, 2, 1),
        ("SGD", "{}", 1, 2, 0),
    ],
)
def test_a_run_resumes_bit_for_bit_also_if_no_step_was_applied(
    workers: dict[int, Workers],
    tmp_path: Path,
    kind: str,
    settings: str,
    world_size: int,
    saved_at: int,
    skipped: int,
) -> None:
    overrides = f"--optimizer.kind={kind}", f"--optimizer.settings={settings}"
    processes = workers[world_size]
    expected = processes.run(_train, tmp_path / "whole", 4, skipped, *overrides)[0]
    halfway = processes.run(_train, tmp_path / "parts", saved_at, skipped, *overrides)[0]
    actual = processes.run(_train, tmp_path / "parts", 4, skipped, *overrides)[0]
    for name, weight in expected.items():
        np.testing.assert_array_equal(actual[name], weight, err_msg=name)
    assert any((halfway[name] != weight).any() for name, weight in expected.items())
