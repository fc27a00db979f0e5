"""AdamW and Adam with moments in bfloat16, against torch.optim and in several layouts."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.distributed import Workers
from tests.runs import build_trainer, train, whole
from titan_lite.config.optimizers import Muon
from titan_lite.models.llama import LLAMA
from titan_lite.nn.build_model import build_model
from titan_lite.optim.low_precision_adam import LowPrecisionAdam
from titan_lite.optim.nonfinite import NonFiniteGuard, step_if
from titan_lite.optim.optimizer import Surroundings, build_optimizer

BFLOAT16 = "--optimizer.state_dtype=bfloat16"


@pytest.mark.parametrize("name", ["AdamW", "Adam"])
def test_it_is_torch_s_step_but_for_the_rounding_of_the_moments(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(64, generator=generator)
    local, peer = (torch.nn.Parameter(start.clone()) for _ in range(2))
    settings: dict[str, Any] = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8}
    groups = [{"params": [local], "weight_decay": 0.2}]
    optimizer = LowPrecisionAdam(groups, **settings, decoupled=name == "AdamW")
    reference = getattr(torch.optim, name)([peer], **settings, weight_decay=0.2)
    for step in range(4):
        local.grad = torch.randn(64, generator=generator)
        peer.grad = local.grad.clone()
        optimizer.step()
        reference.step()
        # The first step sees no rounded moment.
        rtol = 1e-6 if step == 0 else 2e-2
        torch.testing.assert_close(local, peer, rtol=rtol, atol=rtol / 10)
    state = optimizer.state[local]
    assert {state[key].dtype for key in ("exp_avg", "exp_avg_sq")} == {torch.bfloat16}
    assert (local != peer).any()


def test_a_bad_step_changes_nothing_and_scaled_gradients_are_divided() -> None:
    weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    for weight, scale in zip(weights, (1.0, 4.0), strict=True):
        settings: dict[str, Any] = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8}
        optimizer = LowPrecisionAdam([weight], **settings, decoupled=True)
        guard = NonFiniteGuard("skip", torch.device("cpu"))
        for value in (torch.nan, 0.5, 0.25):
            weight.grad = torch.full((2,), value * scale)
            guard.step(
                optimizer,
                is_finite=weight.grad.isfinite().all(),
                grad_scale=torch.tensor(scale),
                norms=torch.ones(1),
                owners=["a"],
            )
        assert optimizer.state[weight]["step"] == 2
    assert (weights[0] == weights[1]).all()
    assert weights[0].isfinite().all()


def test_muon_steps_its_other_parameters_with_it() -> None:
    args = replace(LLAMA.flavors["debug"], num_layers=1, vocab_size=64)
    model = build_model(LLAMA, args)
    around = Surroundings(ranks=None, param_dtype=torch.float32, args=args)
    optimizer = build_optimizer(model, Muon(state_dtype="bfloat16"), LLAMA.tp_plan, around)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    for is_finite in (True, False):
        before = [parameter.detach().clone() for parameter in model.parameters()]
        step_if(optimizer, torch.tensor(is_finite), None)
        pairs = zip(before, model.parameters(), strict=True)
        assert all(bool((old != new).any()) == is_finite for old, new in pairs)
    state = optimizer.state[model.get_parameter("norm.weight")]
    assert (state["exp_avg"].dtype, state["step"]) == (torch.bfloat16, 1)


def _resume(folder: Path, *overrides: str) -> dict[str, np.ndarray]:
    trainer = build_trainer(folder, BFLOAT16, "--checkpoint.enable=true", *overrides)
    for step in range(trainer.state.step + 1, 7):
        trainer.train_step(step)
        if step == 3:
            trainer.save()
    weights = whole(trainer.training.model)
    trainer.close()
    return weights


@pytest.mark.distributed
def test_a_run_is_the_same_in_two_layouts_and_resumed(
    workers: dict[int, Workers], tmp_path: Path
) -> None:
    one = workers[1].run(train, tmp_path / "one", BFLOAT16, "--training.steps=6")[0]
    layout = ("--training.local_batch_size=4",)
    records = workers[2].run(train, tmp_path / "two", BFLOAT16, "--training.steps=6", *layout)[0]
    for key in ("loss", "grad_norm"):
        expected = [record[key] for record in one]
        assert [record[key] for record in records] == pytest.approx(expected, rel=1e-5)
    first, again = (workers[2].run(_resume, tmp_path / "three", *layout)[0] for _ in range(2))
    assert all((first[name] == again[name]).all() for name in first)
