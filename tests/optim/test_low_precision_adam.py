"""AdamW and Adam with moments in 16 and 8 bits, against torch.optim and torchao, in layouts."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torchao.optim
from torch.distributed.tensor import DTensor

from tests.distributed import Workers
from tests.runs import Tensors, build_trainer, slow_but, train, whole
from titan_lite.config.optimizers import Muon
from titan_lite.models.llama import LLAMA
from titan_lite.nn.build_model import build_model
from titan_lite.optim import low_precision_adam
from titan_lite.optim.low_precision_adam import LowPrecisionAdam
from titan_lite.optim.nonfinite import NonFiniteGuard, step_if
from titan_lite.optim.optimizer import OptimizerContext, build_optimizer
from titan_lite.training.trainer import Trainer

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


# Kept in one chunk of 4096 elements: torchao leaves a smaller shard, and parts of blocks, alone.
SHAPES = ((64, 192), (96,), (4097,))


@pytest.mark.parametrize("state_dtype", ["int8", "float8"])
@pytest.mark.parametrize("name", ["AdamW", "Adam"])
def test_in_8_bits_it_is_torchao_s_step(
    name: str, state_dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(low_precision_adam, "CHUNK", 4096)
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randn(shape, generator=generator) for shape in SHAPES]
    local, peer = ([torch.nn.Parameter(start.clone()) for start in starts] for _ in range(2))
    settings: dict[str, Any] = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8}
    groups = [{"params": local, "weight_decay": 0.2}]
    decoupled = name == "AdamW"
    optimizer = LowPrecisionAdam(groups, **settings, decoupled=decoupled, state_dtype=state_dtype)
    kind = f"{name}{'8bit' if state_dtype == 'int8' else 'Fp8'}"
    reference = getattr(torchao.optim, kind)(peer, **settings, weight_decay=0.2)
    for _ in range(4):
        for own, other in zip(local, peer, strict=True):
            own.grad = torch.randn(own.shape, generator=generator)
            other.grad = own.grad.clone()
        optimizer.step()
        # torchao would compile it.
        with torch.compiler.set_stance("force_eager"):
            reference.step()
        for own, other in zip(local, peer, strict=True):
            torch.testing.assert_close(own, other, rtol=1e-6, atol=2e-6)
    states = [optimizer.state[parameter]["exp_avg"] for parameter in local]
    assert [hasattr(state, "codes") for state in states] == [True, False, False]
    codes = [o.state[p[0]]["exp_avg"].codes for o, p in ((optimizer, local), (reference, peer))]
    # A value halfway between two codes may be rounded either way.
    assert (codes[0].view(torch.uint8) != codes[1].view(torch.uint8)).float().mean() < 1e-3


@pytest.mark.parametrize("state_dtype", ["bfloat16", "int8", "float8"])
def test_a_bad_step_changes_nothing_and_scaled_gradients_are_divided(state_dtype: str) -> None:
    weights = [torch.nn.Parameter(torch.ones(4096)) for _ in range(2)]
    for weight, scale in zip(weights, (1.0, 4.0), strict=True):
        settings: dict[str, Any] = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8}
        optimizer = LowPrecisionAdam([weight], **settings, decoupled=True, state_dtype=state_dtype)
        guard = NonFiniteGuard("skip", torch.device("cpu"))
        # The values of a block have not one size, so that rounding again would change them.
        pattern = torch.linspace(-1, 0.3, 4096)
        for value in (torch.nan, 0.5, torch.nan, 0.25):
            weight.grad = value * scale * pattern
            former = [_bits(state) for state in optimizer.state[weight].values()]
            guard.step(
                optimizer,
                is_finite=weight.grad.isfinite().all(),
                divisor=torch.tensor(scale),
                norms=torch.ones(1),
                owners=["a"],
            )
            if math.isnan(value):
                now = [_bits(state) for state in optimizer.state[weight].values()]
                assert all(map(torch.equal, former, now))
        assert optimizer.state[weight]["step"] == 2
    assert (weights[0] == weights[1]).all()
    assert weights[0].isfinite().all()


def _bits(state: torch.Tensor) -> torch.Tensor:
    parts = [state] if not hasattr(state, "codes") else [state.codes, state.scale]
    return torch.cat([part.flatten().view(torch.uint8) for part in parts])


def test_muon_steps_its_other_parameters_with_it() -> None:
    args = replace(LLAMA.flavors["debug"], num_layers=1, vocab_size=64)
    model = build_model(LLAMA, args)
    context = OptimizerContext(ranks=None, param_dtype=torch.float32, args=args)
    optimizer = build_optimizer(model, Muon(state_dtype="bfloat16"), LLAMA.tp_plan, context)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    for is_finite in (True, False):
        before = [parameter.detach().clone() for parameter in model.parameters()]
        step_if(optimizer, torch.tensor(is_finite), None)
        pairs = zip(before, model.parameters(), strict=True)
        assert all(bool((old != new).any()) == is_finite for old, new in pairs)
    state = optimizer.state[model.get_parameter("norm.weight")]
    assert (state["exp_avg"].dtype, state["step"]) == (torch.bfloat16, 1)


def _resume(folder: Path, *overrides: str) -> tuple[Tensors, Tensors]:
    """Returns the moments in float32 after step 3, saved or loaded, and the weights of step 6."""
    trainer = build_trainer(folder, "--checkpoint.enable=true", *overrides)
    moments = _moments(trainer)
    for step in range(trainer.state.step + 1, 7):
        trainer.train_step(step)
        if step == 3:
            trainer.save()
            moments = _moments(trainer)
    weights = whole(trainer.built.model)
    trainer.close()
    return moments, weights


def _moments(trainer: Trainer) -> Tensors:
    states = trainer.built.train_step.optimizer.state
    wholes = {}
    for name, parameter in trainer.built.model.named_parameters():
        for key in low_precision_adam.MOMENTS:
            moment = states[parameter][key]
            assert isinstance(moment, DTensor)
            local = moment.to_local()
            local = local.dequantize() if hasattr(local, "codes") else local.float()
            whole = DTensor.from_local(
                local,
                moment.device_mesh,
                moment.placements,
                run_check=False,
                shape=moment.shape,
                stride=moment.stride(),
            )
            wholes[f"{name}.{key}"] = whole.full_tensor().numpy().copy()
    return wholes


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
    layout = (*layout, BFLOAT16)
    first, again = (workers[2].run(_resume, tmp_path / "three", *layout)[0] for _ in range(2))
    assert all((first[1][name] == again[1][name]).all() for name in first[1])


TP2 = "--parallel.tp=2"


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("state_dtype", "other"),
    slow_but([("int8", "float32")], [("int8", "float32"), ("int8", "float8"), ("float8", "int8")]),
)
def test_a_run_in_8_bits_is_resumed_bit_for_bit_and_in_other_layouts_and_types(
    state_dtype: str, other: str, workers: dict[int, Workers], tmp_path: Path
) -> None:
    settings = (f"--optimizer.state_dtype={state_dtype}", "--checkpoint.load_step=3")
    moments, weights = workers[2].run(_resume, tmp_path, settings[0], TP2)[0]
    _, again = workers[2].run(_resume, tmp_path, *settings, TP2)[0]
    assert all((weights[name] == again[name]).all() for name in weights)
    for dtype in (state_dtype, other):
        setting = f"--optimizer.state_dtype={dtype}"
        loaded, _ = workers[1].run(_resume, tmp_path, setting, settings[1])[0]
        assert all((moments[name] == loaded[name]).all() for name in moments)
