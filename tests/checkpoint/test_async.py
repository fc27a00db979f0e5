"""Saving in the background: what is saved is the state of the step, and every second is counted."""

import os
import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.staging import DefaultStager

from tests.distributed import GUARD, Workers
from tests.runs import build_trainer, read_metrics
from titan_lite.checkpoint import storage
from titan_lite.checkpoint.manager import CheckpointManager
from titan_lite.checkpoint.manifest import read_manifest
from titan_lite.checkpoint.saving import SaveError, Saver
from titan_lite.checkpoint.state import saved_steps
from titan_lite.training.trainer import Trainer

EVERY_3 = (
    "--checkpoint.enable=true",
    "--checkpoint.interval=3",
    "--training.steps=8",
    "--training.local_batch_size=4",
)
SLOW = 0.3


def _slowly(folder: Path, mode: str, *overrides: str) -> list[dict[str, Any]]:
    """Trains while saves take long.

    In the background, writing lasts until training reaches the next step or waits for it. A copy in
    a thread lasts until training reaches the optimizer.
    """
    write, stage, start = storage.CheckpointWriter.write_data, DefaultStager._stage, Saver.start
    wait, wait_for_copy = CheckpointManager.wait, CheckpointManager._wait_for_staging
    at_optimizer, at_next_step = threading.Event(), threading.Event()

    def slow_start(*arguments: Any) -> None:
        at_optimizer.clear()
        at_next_step.clear()
        start(*arguments)

    def slow_stage(*arguments: Any, **options: Any) -> Any:
        assert at_optimizer.wait(GUARD)
        return stage(*arguments, **options)

    def slow_write(*arguments: Any) -> Any:
        if mode == "disabled":
            time.sleep(SLOW)
        else:
            assert at_next_step.wait(GUARD)
        return write(*arguments)

    def tell_wait_for_copy(*arguments: Any) -> None:
        at_optimizer.set()
        wait_for_copy(*arguments)

    def tell_wait(self: CheckpointManager) -> None:
        # The last save has no step after it.
        at_optimizer.set()
        at_next_step.set()
        wait(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Saver, "start", slow_start)
        patch.setattr(DefaultStager, "_stage", slow_stage)
        patch.setattr(storage.CheckpointWriter, "write_data", slow_write)
        patch.setattr(CheckpointManager, "_wait_for_staging", tell_wait_for_copy)
        patch.setattr(CheckpointManager, "wait", tell_wait)
        trainer = build_trainer(folder, *EVERY_3, f"--checkpoint.async_mode={mode}", *overrides)
        trainer.built.train_step.optimizer.register_step_post_hook(lambda *_: at_next_step.set())
        try:
            trainer.train()
        finally:
            trainer.close()
    return read_metrics(folder)


@pytest.mark.distributed
def test_in_the_background_the_same_is_saved_while_training_takes_steps(
    workers: dict[int, Workers], tmp_path: Path
) -> None:
    records = {
        mode: workers[2].run(_slowly, tmp_path / mode, mode)[0]
        for mode in ("disabled", "async", "async_pinned")
    }
    costs = {
        mode: [r for r in actual if "checkpoint_bytes" in r] for mode, actual in records.items()
    }
    # At the next logged step; the last save ends after the last one.
    assert [record["step"] for record in costs["disabled"]] == [4, 7]
    for mode, actual in costs.items():
        assert [record["loss"] for record in records[mode]] == [
            record["loss"] for record in records["disabled"]
        ]
        for step in (3, 6, 8):
            here, there = (
                read_manifest(tmp_path / other / "checkpoint" / f"step-{step}").files
                for other in (mode, "disabled")
            )
            # To the byte, of both ranks: what the optimizer did meanwhile is not in it.
            assert here == there, (mode, step)
        manifest = read_manifest(tmp_path / mode / "checkpoint" / "step-3")
        for record in actual:
            assert record["checkpoint_bytes"] == pytest.approx(manifest.bytes, rel=0.01)
            seconds = record["checkpoint_seconds"]
            speed = record["checkpoint_bytes"] / seconds / 1e9
            assert record["checkpoint_gb_per_second"] == pytest.approx(speed)
    first = {mode: actual[0] for mode, actual in costs.items()}
    assert first["disabled"]["checkpoint_blocked_seconds"] >= SLOW
    for record in first.values():
        assert record["checkpoint_blocked_seconds"] > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_pinned_copies_beside_training_are_those_of_the_step(
    gpu_workers: dict[int, Workers], tmp_path: Path
) -> None:
    for mode in ("disabled", "async", "async_pinned"):
        gpu_workers[1].run(_slowly, tmp_path / mode, mode, "--training.deterministic=true")
        for step in (3, 6, 8):
            here, there = (
                read_manifest(tmp_path / other / "checkpoint" / f"step-{step}").files
                for other in (mode, "disabled")
            )
            assert here == there, (mode, step)


class _FullDisk:
    """In io's place in storage.py: files of rank 1 go to a device that is always full."""

    def __getattr__(self, name: str) -> Any:
        import io

        if name == "FileIO" and dist.get_rank() == 1:
            return lambda path, mode: io.FileIO("/dev/full", mode)
        return getattr(io, name)


def _on_a_full_disk(folder: Path, mode: str) -> tuple[str, int]:
    """The error, and the step after which it came; the disk is full after the first save."""
    trainer = build_trainer(folder, *EVERY_3, f"--checkpoint.async_mode={mode}")
    save = Trainer.save

    def save_and_fill(self: Trainer) -> None:
        if self.state.step == 6:
            self.checkpoints.wait()
            patch.setattr(storage, "io", _FullDisk())
        save(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "save", save_and_fill)
        try:
            trainer.train()
        except SaveError as error:
            return str(error), trainer.state.step
        finally:
            trainer.close()
    return "no error", 0


@pytest.mark.distributed
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a full device")  # noqa: PTH110
@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_a_full_disk_is_told_on_every_rank_with_the_folder_and_what_was_needed(
    mode: str, workers: dict[int, Workers], tmp_path: Path
) -> None:
    logged = workers[2].run(_on_a_full_disk, tmp_path, mode)
    # How much is free changes while they ask.
    of_each = [re.sub(r"and \S+ GB are free", "", message) for message, _ in logged]
    assert of_each[0] == of_each[1]
    message, step = logged[0]
    assert logged[1][1] == step
    folder = tmp_path / "checkpoint"
    assert message.startswith(f"step 6 was not saved to {folder}: rank 1: [Errno 28] No space left")
    size = read_manifest(folder / "step-3").bytes
    numbers = re.search(r"this run takes ([\d.]+) ([kM])B, and [\d.]+ [kMGT]?B are free", message)
    assert numbers
    # Without what files of few bytes add.
    unit = {"k": 1e3, "M": 1e6}[numbers[2]]
    assert float(numbers[1]) * unit == pytest.approx(size, rel=0.2)
    assert step in ((6,) if mode == "disabled" else (7, 8))
    assert saved_steps(folder) == [3]
    assert [path.name for path in folder.iterdir()] == ["step-3"]


def test_a_folder_that_cannot_be_made_is_told(one_process: Workers, tmp_path: Path) -> None:
    # A link to nowhere: what is a file is refused before.
    (tmp_path / "checkpoint").symlink_to(tmp_path / "no" / "such")
    with pytest.raises(AssertionError, match=r"SaveError: step 3 was not saved to .*checkpoint: "):
        one_process.run(_slowly, tmp_path, "disabled")
