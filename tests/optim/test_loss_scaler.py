"""Dynamic loss scaling: a step that overflows is skipped on every rank, and training continues."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.distributed import Workers
from tests.runs import build_trainer, train, whole
from titan_lite.config.load import ConfigError
from titan_lite.models.plan import make_plan
from titan_lite.optim import loss_scaler
from titan_lite.optim.loss_scaler import LossScaler

FLOAT16 = "--training.param_dtype=float16"
# Overflows at first: a gradient of this model has elements above 0.01.
LARGE = 2.0**26
UNUSED: dict[str, Any] = {"norms": torch.ones(0), "owners": ()}


@pytest.mark.parametrize("implementation", ["fused", "foreach"])
def test_a_step_that_is_not_finite_changes_nothing_but_the_scale(implementation: str) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1, **{implementation: True})
    scaler = LossScaler(torch.device("cpu"))
    weight.grad = torch.tensor([1.0, torch.inf, 1.0])
    scaler.step(optimizer, **UNUSED, is_finite=torch.tensor(False), divisor=None)
    assert weight.tolist() == [1, 1, 1]
    assert scaler.metrics() == {"loss_scale": 32768, "skipped_steps": 1}
    weight.grad = torch.full((3,), 8.0)
    scaler.step(optimizer, **UNUSED, is_finite=torch.tensor(True), divisor=torch.tensor(8.0))
    assert optimizer.state[weight]["exp_avg"].tolist() == pytest.approx([0.1] * 3)
    # The first step that counts: Adam's correction of its moments makes it one of lr.
    torch.testing.assert_close(weight.data, torch.full((3,), 1 - 0.1 - 0.001))
    assert scaler.metrics() == {"loss_scale": 32768, "skipped_steps": 1}


def test_the_scale_grows_after_enough_finite_steps_in_a_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loss_scaler, "GROWTH_INTERVAL", 2)
    weight = torch.nn.Parameter(torch.ones(1))
    weight.grad = torch.ones(1)
    scaler = LossScaler(torch.device("cpu"))
    scales = []
    for is_finite in (True, False, True, True, True, True, True):
        optimizer = torch.optim.AdamW([weight], fused=True)
        scaler.step(optimizer, **UNUSED, is_finite=torch.tensor(is_finite), divisor=None)
        scales.append(scaler.scale.item() / 65536)
    assert scales == [1, 0.5, 0.5, 1, 1, 2, 2]


def test_a_scale_that_can_fall_no_further_ends_a_run_that_has_diverged() -> None:
    weight = torch.nn.Parameter(torch.ones(1))
    weight.grad = torch.ones(1)
    optimizer = torch.optim.AdamW([weight], fused=True)
    scaler = LossScaler(torch.device("cpu"))
    for step in range(1, 18):
        scaler.check(step, 1.0)
        if step < 17:
            scaler.check(step, torch.inf)
        scaler.step(optimizer, **UNUSED, is_finite=torch.tensor(False), divisor=None)
    assert scaler.metrics() == {"loss_scale": 1, "skipped_steps": 17}
    message = r"step 18: the gradient norm is nan at the minimum loss scale \(1\), after 17 skipped"
    with pytest.raises(RuntimeError, match=message):
        scaler.check(18, float("nan"))


def test_float16_computes_close_to_float32(one_process: Workers, tmp_path: Path) -> None:
    expected = one_process.run(train, tmp_path / "a")[0]
    records = one_process.run(train, tmp_path / "b", FLOAT16)[0]
    for key in ("loss", "grad_norm"):
        got = [record[key] for record in records]
        assert got != [record[key] for record in expected]
        assert got == pytest.approx([record[key] for record in expected], rel=1e-3)
    assert {record["loss_scale"] for record in records} == {65536}


def _overflow(folder: Path, *overrides: str) -> tuple[list[dict[str, Any]], list[bool]]:
    """Records of a run with too large a scale, and which steps changed the weights."""
    trainer = build_trainer(folder, FLOAT16, "--training.steps=12", *overrides)
    assert isinstance(trainer.built.train_step.guard, LossScaler)
    trainer.built.train_step.guard.scale.fill_(LARGE)
    records, changed = [], []
    for step in range(1, 13):
        before = whole(trainer.built.model)["output.weight"]
        record = trainer.train_step(step)
        assert record is not None
        records.append(record)
        changed.append(bool((whole(trainer.built.model)["output.weight"] != before).any()))
    trainer.close()
    return records, changed


@pytest.mark.distributed
@pytest.mark.parametrize("settings", [(), ("--parallel.tp=2",)], ids=["fsdp 2", "tp 2"])
def test_steps_that_overflow_are_skipped_until_the_scale_fits(
    settings: tuple[str, ...], workers: dict[int, Workers], tmp_path: Path
) -> None:
    records, changed = workers[2].run(
        _overflow, tmp_path, "--training.local_batch_size=4", *settings
    )[0]
    assert changed[:2] == [False, False]
    assert sum(changed) >= 4
    assert [np.isfinite(record["grad_norm"]) for record in records] == changed
    skipped = changed.count(False)
    assert records[-1]["skipped_steps"] == skipped
    assert records[-1]["loss_scale"] == LARGE / 2**skipped
    assert all(np.isfinite(record["loss"]) for record in records)


def _overflow_on_last_rank(folder: Path) -> bool:
    trainer = build_trainer(folder, FLOAT16, "--training.local_batch_size=4")
    before = whole(trainer.built.model)
    parameter = trainer.built.model.get_parameter("output.weight")

    def spoil(grad_owner: torch.Tensor) -> None:
        if trainer.process.rank == trainer.process.world_size - 1:
            assert grad_owner.grad is not None
            grad_owner.grad.to_local()[0, 0] = torch.inf  # type: ignore[attr-defined]

    parameter.register_post_accumulate_grad_hook(spoil)
    trainer.train_step(1)
    trainer.close()
    after = whole(trainer.built.model)
    return all((after[name] == before[name]).all() for name in before)


@pytest.mark.distributed
def test_what_overflows_on_one_rank_is_skipped_by_all(
    workers: dict[int, Workers], tmp_path: Path
) -> None:
    assert workers[2].run(_overflow_on_last_rank, tmp_path) == [True, True]


def test_float16_reduction_without_loss_scaling_is_refused() -> None:
    with pytest.raises(
        ConfigError, match='reduce_dtype = "float16" is not supported with training'
    ):
        make_plan(None, ["--training.reduce_dtype=float16"], world_size=1)
    make_plan(None, ["--training.reduce_dtype=float16", FLOAT16], world_size=1)
