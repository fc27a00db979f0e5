"""The progress of a dry run on stderr."""

import io
import itertools
import time

import pytest
import torch
from torch import nn

from titan_lite.dryrun.rank_progress import RankProgress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def one_step(progress: RankProgress) -> None:
    """Settings of two blocks and two micro-batches."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    progress.watch(model, 2, optimizer)
    for _ in range(2):
        model(torch.ones(1, 2)).sum().backward()
    optimizer.step()


def test_a_terminal_has_a_bar_that_counts_blocks_forward_and_backward() -> None:
    stream = Terminal()
    progress = RankProgress(3, 1, 2, stream)
    one_step(progress)
    shown = stream.getvalue()
    for phase in ("building the model", "forward", "backward", "optimizer"):
        assert f"rank 3 (1 of 2): {phase}" in shown
    assert "8/8 blocks" in shown
    progress.close()
    assert stream.getvalue().rstrip("\r").endswith(" "), "erased"


def test_elsewhere_there_is_a_line_for_each_phase_and_each_half_minute(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream = io.StringIO()
    ticks = itertools.count(step=12.0)
    monkeypatch.setattr(time, "monotonic", lambda: next(ticks))
    one_step(RankProgress(0, 1, 1, stream))
    assert stream.getvalue().splitlines() == [
        "rank 0: building the model",
        "rank 0: backward, 3 of 8 blocks",
        "rank 0: forward, 6 of 8 blocks",
        "rank 0: optimizer",
    ]
