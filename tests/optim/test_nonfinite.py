"""NaN and Inf steps end the run before they are applied, or are skipped, on all ranks alike."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.distributed import Workers
from tests.runs import build_trainer, train, whole
from titan_lite.models.plan import make_plan
from titan_lite.optim.nonfinite import DeviceGuardedOptimizer, NonFiniteError, NonFiniteGuard
from titan_lite.training.step import TrainStep
from titan_lite.training.trainer import Trainer

SKIP = "--training.nonfinite=skip"


def _spoil(trainer: Trainer, name: str, bad_step: int) -> None:
    """Puts an infinity into a gradient, on the last of the ranks that have some of it."""
    parameters = dict(trainer.built.model.named_parameters())
    if name not in parameters or trainer.process.rank < trainer.process.world_size - 1:
        return

    def spoil(owner: Any) -> None:
        if trainer.state.step + 1 == bad_step:
            owner.grad.to_local()[0, 0] = torch.inf

    parameters[name].register_post_accumulate_grad_hook(spoil)


def _stop(folder: Path, *overrides: str) -> tuple[str, bool]:
    """The message, and whether the weights are as after the step before."""
    trainer = build_trainer(folder, "--training.local_batch_size=4", *overrides)
    _spoil(trainer, "layers.1.attention.wo.weight", bad_step=2)
    trainer.train_step(1)
    before = whole(trainer.built.model)
    with pytest.raises(NonFiniteError) as error:
        trainer.train_step(2)
    trainer.close()
    after = whole(trainer.built.model)
    return str(error.value), all((after[name] == before[name]).all() for name in before)


@pytest.mark.distributed
@pytest.mark.parametrize("axis", ["dp_shard", "tp", "pp"])
def test_a_gradient_that_is_not_finite_ends_the_run_on_all_ranks_before_the_step_is_applied(
    workers: dict[int, Workers], tmp_path: Path, axis: str
) -> None:
    answers = workers[2].run(_stop, tmp_path, f"--parallel.{axis}=2")
    assert [unchanged for _, unchanged in answers] == [True, True]
    (message,) = {message for message, _ in answers}
    assert message.startswith("the loss of step 2 is 8.09")
    assert "its gradient norm inf. Non-finite gradients in 1 of 21 parameters. First in" in message
    assert "layers.1.attention.wo.weight (rank 1). The step was not applied" in message


def _infinite_loss(folder: Path, *overrides: str) -> list[dict[str, Any]]:
    """A loss that is infinite on one rank, in one step, with gradients that are not."""
    from titan_lite.training import inputs as module

    loss = module.cross_entropy_sum
    trainer = build_trainer(folder, "--training.local_batch_size=4", *overrides)

    def spoiled(*args: Any, **kwargs: Any) -> torch.Tensor:
        is_bad = trainer.state.step == 1 and trainer.process.rank == 1
        return loss(*args, **kwargs) + (torch.inf if is_bad else 0)

    module.cross_entropy_sum = spoiled  # type: ignore[assignment]
    records = []
    try:
        for step in (1, 2, 3):
            record = trainer.train_step(step)
            assert record is not None
            weight = whole(trainer.built.model)["output.weight"]
            records.append({**record, "weight": weight})
        return [*records, trainer.built.train_step.guard.state_dict()]
    finally:
        module.cross_entropy_sum = loss
        trainer.close()


@pytest.mark.distributed
def test_skip_drops_and_counts_a_step_that_is_infinite_on_one_rank(
    workers: dict[int, Workers], tmp_path: Path
) -> None:
    for first, second, third, state in workers[2].run(_infinite_loss, tmp_path, SKIP):
        assert (first["weight"] == second["weight"]).all()
        assert (second["weight"] != third["weight"]).any()
        assert [r["skipped_steps"] for r in (first, second, third)] == [0, 1, 1]
        assert second["loss"] == float("inf")
        assert state == {"skipped_steps": 1}
    with pytest.raises(AssertionError, match=r"loss of step 2 is inf.*All gradients are finite"):
        workers[2].run(_infinite_loss, tmp_path / "stop")


@pytest.mark.parametrize("implementation", ["fused", "foreach"])
def test_no_step_after_a_bad_one_is_applied_before_the_host_has_heard(implementation: str) -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight], lr=0.1, **{implementation: True})
    guard = NonFiniteGuard("stop", torch.device("cpu"))
    for norms in ([1.0, torch.inf], [torch.nan, 1.0], [1.0, 1.0]):
        weight.grad = torch.ones(2)
        guard.step(
            optimizer,
            is_finite=torch.tensor(norms).isfinite().all(),
            divisor=None,
            norms=torch.tensor(norms),
            owners=["a", "b"],
        )
    assert weight.tolist() == [1, 1]
    assert guard.bad_gradients() == {"b"}


class _Sign(DeviceGuardedOptimizer):
    """Steps by the sign of the gradient, and decides on the device."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                stepped = parameter - group["lr"] * parameter.grad.sign()
                self.assign(parameter, stepped)


@pytest.mark.parametrize(
    "optimizer",
    [
        torch.optim.SGD,
        torch.optim.Adafactor,
        torch.optim.Adagrad,
        torch.optim.Adamax,
        torch.optim.NAdam,
        torch.optim.RAdam,
        torch.optim.RMSprop,
        torch.optim.Rprop,
        torch.optim.ASGD,
        torch.optim.Adadelta,
        torch.optim.Muon,
        _Sign,
    ],
)
def test_any_optimizer_leaves_weights_and_state_alone_in_a_bad_step(optimizer: Any) -> None:
    weight = torch.nn.Parameter(torch.ones(2, 2))
    defaults = ({"lr": 0.1},) if optimizer is _Sign else ()
    instance = optimizer([weight], *defaults)
    guard = NonFiniteGuard("skip", torch.device("cpu"))
    changed = []
    for value in (1.0, torch.nan, 1.0):
        before = weight.detach().clone(), str(instance.state)
        weight.grad = torch.full((2, 2), value)
        is_applied = guard.step(
            instance,
            is_finite=weight.grad.isfinite().all(),
            divisor=None,
            norms=torch.ones(1),
            owners=["a"],
        )
        changed.append(bool((weight != before[0]).any()) or str(instance.state) != before[1])
        assert bool(is_applied) == changed[-1]
    assert changed == [True, False, True]


def test_the_count_of_dropped_steps_is_resumed() -> None:
    guard = NonFiniteGuard("skip", torch.device("cpu"))
    guard.load_state_dict({"skipped_steps": 3})
    assert guard.metrics() == {"skipped_steps": 3}


def test_float16_says_that_loss_scaling_decides(caplog: pytest.LogCaptureFixture) -> None:
    make_plan(None, [SKIP, "--training.param_dtype=float16"], world_size=1)
    assert (
        "training.nonfinite (command line) has no effect because training.param_dtype"
        in caplog.text
    )


def test_a_guarded_run_is_the_same_whatever_it_would_do(
    one_process: Workers, tmp_path: Path
) -> None:
    few = "--training.steps=3"
    stop = one_process.run(train, tmp_path / "stop", few)[0]
    skip = one_process.run(train, tmp_path / "skip", few, SKIP)[0]
    assert [r["loss"] for r in stop] == [r["loss"] for r in skip]
    assert [r["skipped_steps"] for r in skip] == [0, 0, 0]


def _late_on_gpu(folder: Path, *overrides: str) -> tuple[str, bool]:
    """The message about step 3, heard of after step 4, and whether step 3 and 4 changed nothing.

    No step but the first waits for the device before it is enqueued whole.
    """
    trainer = build_trainer(folder, "--metrics.log_freq=100", *overrides)
    _spoil(trainer, "layers.1.attention.wo.weight", bad_step=3)
    for step in (1, 2):
        trainer.train_step(step)
    before = whole(trainer.built.model)
    step, take_step = 3, TrainStep.__call__

    def without_waiting(*arguments: Any, **kwargs: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return take_step(*arguments, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    with mock.patch.object(TrainStep, "__call__", without_waiting):
        trainer.train_step(step)
        with pytest.raises(NonFiniteError) as error:
            trainer.train_step(step + 1)
    trainer.close()
    after = whole(trainer.built.model)
    return str(error.value), all((after[name] == before[name]).all() for name in before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_host_hears_of_a_bad_step_one_step_late_and_nothing_of_it_is_applied(
    gpu_workers: dict[int, Workers], tmp_path: Path
) -> None:
    ((message, unchanged),) = gpu_workers[1].run(_late_on_gpu, tmp_path)
    assert "loss of step 3 is" in message
    assert "of 1 of 21 parameters: layers.1.attention.wo.weight" in message
    assert unchanged
