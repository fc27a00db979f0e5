"""Blocks that stand for others in a dry run, on real tensors."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from titan_lite.dryrun.recorder import PeakMemory, Recorder, Work
from titan_lite.dryrun.repeat import NotRepeatable, repeat_blocks

BLOCKS = 7


class Block(nn.Module):
    """Counts how often it is run."""

    def __init__(self, runs: list[int]) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.runs = runs

    def forward(self, x: Tensor) -> Tensor:
        self.runs.append(1)
        return x + self.linear(x).tanh()


class Forgetful(Block):
    """Does not need its input in backward."""

    def forward(self, x: Tensor) -> Tensor:
        self.runs.append(1)
        return x + self.linear(x * 2).tanh()


class Hoarder(Block):
    """Keeps something of every pass."""

    def forward(self, x: Tensor) -> Tensor:
        self.kept = x * 2
        return super().forward(x)


class Growing(Block):
    """Needs more each time that a block of its kind is run."""

    def forward(self, x: Tensor) -> Tensor:
        torch.ones(100 * len(self.runs))
        return super().forward(x)


def step(
    kind: Callable[[list[int]], Block], *, repeats: bool
) -> tuple[list[PeakMemory], Work, list[Tensor | None], int]:
    """Peaks of three micro-batches, work, gradients, and passes through blocks."""
    runs: list[int] = []
    torch.manual_seed(0)
    blocks = [kind(runs) for _ in range(BLOCKS)]
    parameters = [p for block in blocks for p in block.parameters()]
    with Recorder(lambda _: "") as recorder:
        recorder.mark(parameters, "parameters")
        if repeats:
            repeat_blocks(recorder, [blocks])
        moments = [recorder.now()]
        for _ in range(3):
            x = torch.ones(8, 4, requires_grad=True) * 1
            for block in blocks:
                x = block(x)
            x.sum().backward()
            del x
            moments.append(recorder.now())
    peaks = [recorder.peak(start, end) for start, end in itertools.pairwise(moments)]
    return peaks, recorder.work, [p.grad for p in parameters], len(runs)


@pytest.mark.parametrize("kind", [Block, Forgetful])
def test_few_blocks_run_and_all_are_counted(kind: type[Block]) -> None:
    peaks, work, grads, runs = step(kind, repeats=True)
    full_peaks, full_work, full_grads, full_runs = step(kind, repeats=False)
    assert (peaks, work) == (full_peaks, full_work)
    assert [grad is not None for grad in grads] == [grad is not None for grad in full_grads]
    # The first two and the last two blocks, in two of three micro-batches.
    assert (runs, full_runs) == (4 * 2, BLOCKS * 3)


def test_what_a_block_keeps_cannot_be_repeated() -> None:
    with pytest.raises(NotRepeatable, match="outlive"):
        step(Hoarder, repeats=True)


def test_blocks_that_do_different_things_are_noticed() -> None:
    with pytest.raises(NotRepeatable, match="two passes differ"):
        step(Growing, repeats=True)


def test_blocks_with_other_settings_do_not_stand_for_each_other() -> None:
    def numbered(runs: list[int]) -> Block:
        block = Block(runs)
        block.number = next(numbers)  # type: ignore[assignment]
        return block

    numbers = iter(range(BLOCKS))
    *_, runs = step(numbered, repeats=True)
    # Each is first and last of a separate row.
    assert runs == BLOCKS * 2
