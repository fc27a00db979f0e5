"""Warnings: a loss that jumps, a rank that waits for data or computes while others do not."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.distributed import Workers
from tests.runs import Clock, build_trainer
from titan_lite.metrics.alerts import LossWatch, slow_ranks
from titan_lite.training.step import TrainStep


def _spikes(losses: list[float]) -> list[int]:
    watch = LossWatch()
    return [step for step, loss in enumerate(losses) if watch.look(step, loss)]


def test_a_loss_far_above_its_running_average_is_a_spike_and_what_falls_is_not() -> None:
    falling = [8 * 0.99**i + 0.05 * (-1) ** i for i in range(60)]
    assert _spikes(falling) == []
    spiked = [*falling]
    spiked[30] *= 2
    spiked[40] = float("nan")
    assert _spikes(spiked) == [30, 40]
    assert _spikes([8.0, 20.0, 8.0]) == [], "too early to judge"


def _disturbed(folder: Path) -> list[str]:
    """Rank 0's warnings when rank 1 waits for data, a loss jumps, and rank 1 becomes slow."""
    trainer = build_trainer(folder, "--training.local_batch_size=4", "--training.steps=30")
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("titan_lite.metrics.alerts").addHandler(handler)
    batches, take_step, clock = trainer.data.batches, TrainStep.__call__, Clock(trainer)

    def is_it(rank: int, *steps: int) -> bool:
        return trainer.process.rank == rank and trainer.state.step + 1 in steps

    def slow() -> Iterator[Any]:
        for batch in batches:
            clock.now += 0.25
            if is_it(1, 6):
                clock.now += 1
            yield batch

    def spiky(*arguments: Any, **kwargs: Any) -> Any:
        result = take_step(*arguments, **kwargs)
        if trainer.state.step + 1 == 13:
            result.loss.mul_(10)
        return result

    def linger(*_: Any) -> None:
        clock.now += 0.1 if is_it(1, *range(15, 26)) else 0.01

    trainer.built.model.get_submodule("layers.1.feed_forward").register_forward_pre_hook(linger)
    trainer.data.batches = slow()
    try:
        with mock.patch.object(TrainStep, "__call__", spiky):
            trainer.train()
    finally:
        logging.getLogger("titan_lite.metrics.alerts").removeHandler(handler)
        trainer.close()
    return messages


@pytest.mark.distributed
def test_a_rank_that_waits_for_data_a_spike_and_a_slow_rank_are_named_on_log_steps(
    workers: dict[int, Workers], tmp_path: Path
) -> None:
    warned, silent = workers[2].run(_disturbed, tmp_path)
    assert silent == []
    waits, spike, *slow = warned
    assert waits == (
        "Rank 1 waits for data at step 6: 1.25 s per step; the median rank waits 0.25 s; a whole "
        "step takes 0.26 s"
    )
    assert spike.startswith("The loss of step 13, ")
    # While most of the last ten steps were slow ones.
    assert slow == [
        f"Rank 1 is slow at step {step}: its forward takes 0.1 s per step; the median rank's takes "
        "0.01 s; a whole step takes 0.26 s"
        for step in range(20, 30)
    ]


def test_only_ranks_of_one_stage_are_compared_and_small_differences_are_none() -> None:
    assert slow_ranks(9, [0.1, 0.12, 0.3, 0.31], [0, 0, 1, 1], 1.0) == []
    (sentence,) = slow_ranks(9, [0.1, 0.2, 0.3, 0.31], [0, 0, 1, 1], 1.0)
    assert sentence == (
        "Rank 1 is slow at step 9: its forward takes 0.2 s per step; the median rank's takes "
        "0.1 s; a whole step takes 1 s"
    )
    assert slow_ranks(9, [0.01, 0.02], [0, 0], 1.0) == []
    assert slow_ranks(9, [0.0, 0.0], [0, 0], 1.0) == [], "before there are ten steps"
