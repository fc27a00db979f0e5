"""Warnings about loss spikes, ranks that wait for data and slow ranks."""

import logging
import statistics
from collections.abc import Sequence

import torch

from titan_lite.metrics.record import Record
from titan_lite.runtime.distributed import Process, all_reduce

logger = logging.getLogger(__name__)

# Decay of the running averages, per record.
DECAY = 0.9
RECORDS_BEFORE_WARNING = 10
# A spike exceeds the average by this many usual deviations, and by this share of the loss.
SPIKE_DEVIATIONS = 5.0
SPIKE_SHARE = 0.05
# A rank starves if it waits for data this share of a step longer than the median rank.
DATA_WAIT_SHARE = 0.2
# A rank is slow if its blocks take this many times as long as those of the median rank, and this
# share of a step longer.
SLOW_FACTOR = 1.3
SLOW_SHARE = 0.05


class RecordWatch:
    """Checks each record and the times of all ranks; rank 0 warns."""

    def __init__(self, process: Process, stages: Sequence[int], *, start_step: int) -> None:
        """stages: pipeline stage of each rank."""
        self._process, self._stages = process, stages
        self._last_step = start_step
        self._loss_watch = LossWatch()

    def look(self, record: Record, waited: float, forward: float) -> None:
        """Warns about loss spikes, data stalls and slow ranks; collective.

        waited: seconds that this rank waited for data since the last record. forward: seconds per
        step of its blocks' forward.
        """
        process, step = self._process, int(record["step"])
        times = torch.zeros(2, process.world_size, device=process.device)
        times[:, process.rank] = torch.tensor((waited, forward))
        waits, forwards = all_reduce(times, "sum").tolist()
        num_steps, self._last_step = step - self._last_step, step
        if process.rank > 0 or record.get("warmup"):
            return
        seconds_per_step = record["seconds_per_step"]
        spike = self._loss_watch.look(step, record["loss"])
        starving = starving_ranks(step, [wait / num_steps for wait in waits], seconds_per_step)
        slow = slow_ranks(step, forwards, self._stages, seconds_per_step)
        for sentence in [*filter(None, [spike]), *starving, *slow]:
            logger.warning("%s", sentence)


class LossWatch:
    """Compares each record's loss with a running average of earlier records."""

    def __init__(self) -> None:
        self._count = 0
        self._average = self._deviation = 0.0

    def look(self, step: int, loss: float) -> str | None:
        """Returns a warning if the loss is far above the average, which then does not change."""
        far = max(SPIKE_DEVIATIONS * self._deviation, SPIKE_SHARE * self._average)
        if self._count >= RECORDS_BEFORE_WARNING and not loss - self._average <= far:
            return (
                f"The loss of step {step}, {loss:.4f}, is far above its running average of "
                f"{self._average:.4f}"
            )
        # The first records have equal weights.
        share = max(1 - DECAY, 1 / (self._count + 1))
        self._deviation += share * (abs(loss - self._average) * (self._count > 0) - self._deviation)
        self._average += share * (loss - self._average)
        self._count += 1
        return None


def starving_ranks(step: int, waits: Sequence[float], seconds_per_step: float) -> list[str]:
    """Returns a warning for each rank that waits much longer for data. waits: seconds per step."""
    median = statistics.median_low(waits)
    return [
        f"Rank {rank} waits for data at step {step}: {wait:.3g} s per step; the median rank waits "
        f"{median:.3g} s; a whole step takes {seconds_per_step:.3g} s"
        for rank, wait in enumerate(waits)
        if wait - median > DATA_WAIT_SHARE * seconds_per_step
    ]


def slow_ranks(
    step: int, forward: Sequence[float], stages: Sequence[int], seconds_per_step: float
) -> list[str]:
    """Returns a warning for each rank whose blocks take much longer than those of most.

    forward: seconds per step. stages: pipeline stage of each rank; only ranks of the same stage are
    compared.
    """
    sentences = []
    for stage in sorted(set(stages)):
        ranks = [rank for rank, its in enumerate(stages) if its == stage]
        median = statistics.median_low(forward[rank] for rank in ranks)
        least = max(SLOW_FACTOR * median, median + SLOW_SHARE * seconds_per_step)
        sentences += [
            f"Rank {rank} is slow at step {step}: its forward takes {forward[rank]:.3g} s per "
            f"step; the median rank's takes {median:.3g} s; a whole step takes "
            f"{seconds_per_step:.3g} s"
            for rank in ranks
            if forward[rank] > least
        ]
    return sentences
