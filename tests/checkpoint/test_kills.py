"""A rank that is killed while a checkpoint is saved costs the steps since the one before."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.distributed import GUARD, Workers
from tests.runs import train
from titan_lite.checkpoint import manager, storage
from titan_lite.checkpoint.state import saved_steps

EVERY_2 = (
    "--checkpoint.enable=true",
    "--checkpoint.interval=2",
    "--training.steps=6",
    "--training.local_batch_size=4",
)


def _die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def victim_of(moment: str) -> int:
    """The first rank alone commits."""
    return 1 if moment == "in the middle of a file" else 0


def _killed(folder: Path, moment: str, *overrides: str) -> None:
    """Trains, and kills one rank in the second save."""
    write, commit = storage._ChecksummedFile.write, manager.CheckpointManager._commit

    def write_half(self: Any, data: Any) -> int:
        if "step-4" in str(self.name) and self.size > 100_000:
            self.flush()
            _die()
        return write(self, data)

    def commit_partly(self: Any, save: Any, files: Any) -> None:
        if save.step == 4:
            patch.setattr(manager, "sync_folder" if "before" in moment else "delete_old", _die)
        commit(self, save, files)

    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1 == victim_of(moment):
            patch.setattr(storage._ChecksummedFile, "write", write_half)
        elif dist.get_rank() == 0 == victim_of(moment):
            patch.setattr(manager.CheckpointManager, "_commit", commit_partly)
        train(folder, *EVERY_2, *overrides)


@pytest.fixture(scope="module")
def undisturbed(
    workers: dict[int, Workers], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    return workers[2].run(train, tmp_path_factory.mktemp("undisturbed"), *EVERY_2)[0]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("moment", "mode", "left"),
    [
        ("in the middle of a file", "disabled", [2]),
        pytest.param("before the commit", "async", [2], marks=pytest.mark.slow),
        pytest.param("after the commit", "disabled", [2, 4], marks=pytest.mark.slow),
    ],
)
def test_a_rank_killed_while_saving_costs_no_more_than_the_steps_since_the_last_save(
    moment: str,
    mode: str,
    left: list[int],
    undisturbed: list[dict[str, Any]],
    workers: dict[int, Workers],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    # Ends the other process as well, as torchrun does.
    with Workers(2, tmp_path_factory.mktemp("group")) as group:
        for connection in group.connections:
            connection.send((_killed, (tmp_path, moment, f"--checkpoint.async_mode={mode}")))
        victim = group.processes[victim_of(moment)]
        victim.join(GUARD)
        assert victim.exitcode == -signal.SIGKILL
    assert saved_steps(tmp_path / "checkpoint") == left
    got = workers[2].run(train, tmp_path, *EVERY_2)[0]
    for key in ("step", "loss", "grad_norm", "lr", "tokens"):
        assert [r[key] for r in got] == [r[key] for r in undisturbed], key
    assert saved_steps(tmp_path / "checkpoint") == [2, 4, 6]
    assert not list((tmp_path / "checkpoint").glob("*.incomplete"))
