"""Warnings: a loss that jumps, a rank that waits for data while the others do not."""

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import Workers
from tests.runs import build_trainer
from titan_lite.metrics.warnings import LossWatch


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
    assert _spikes([8.0, 20.0, 8.0]) == [], "too early to tell"


def _slow_data(folder: Path) -> list[str]:
    """What rank 0 warns of when rank 1 waits for data and a loss is ten times what it was."""
    trainer = build_trainer(folder, "--training.local_batch_size=4", "--training.steps=14")
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("titan_lite.trainer").addHandler(handler)
    batches, train_step = trainer.batches, trainer.step

    def slow() -> Iterator[Any]:
        for batch in batches:
            if trainer.process.rank == 1 and trainer.state.step + 1 == 6:
                time.sleep(1)
            yield batch

    def spiky(*arguments: Any, **kwargs: Any) -> Any:
        result = train_step(*arguments, **kwargs)
        if trainer.state.step + 1 == 13:
            result.loss.mul_(10)
        return result

    trainer.batches = slow()
    trainer.step = spiky  # type: ignore[assignment]
    try:
        trainer.train()
    finally:
        logging.getLogger("titan_lite.trainer").removeHandler(handler)
        trainer.close()
    return [message for message in messages if "step 6" in message or "step 13" in message]


@pytest.mark.distributed
def test_a_rank_that_waits_for_data_and_a_spike_are_named_on_log_steps(
    workers: dict[int, Workers], tmp_path: Path
) -> None:
    first, second = workers[2].run(_slow_data, tmp_path)[0]
    assert first.startswith("Rank 1 waits 1.0")
    assert "up to step 6; the median rank 0.0" in first
    assert second.startswith("The loss of step 13, ")
