"""A checkpoint is resumed under another layout, and another run starts with its weights."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.distributed import Workers
from tests.runs import build_trainer, read_metrics, train, train_and_gather

# A vocabulary that is padded.
SETTINGS = ("--checkpoint.enable=true", "--model.vocab_size=2049", "--training.steps=34")
# Processes, layout, and the step that is the last under it.
JOURNEY = (
    (4, ("--training.local_batch_size=2", "--optimizer.implementation=foreach"), 2),
    (4, ("--parallel.tp=2", "--training.local_batch_size=4"), 12),
    (
        4,
        (
            "--parallel.pp=2",
            "--training.local_batch_size=2",
            "--optimizer.implementation=for-loop",
        ),
        22,
    ),
    (4, ("--parallel.cp=2", "--parallel.dp_replicate=2", "--training.local_batch_size=4"), 23),
    (2, ("--parallel.tp=2",), 24),
    (1, (), 34),
)
MUON_JOURNEY = (
    (4, ("--parallel.tp=2", "--training.local_batch_size=4"), 3),
    (4, ("--parallel.pp=2", "--training.local_batch_size=2"), 5),
    (1, (), 6),
)
EXPERTS_JOURNEY = (
    (2, ("--parallel.ep=2", "--training.local_batch_size=4"), 2),
    (4, ("--parallel.tp=2", "--parallel.ep=2", "--training.local_batch_size=4"), 3),
    (4, ("--parallel.ep=2", "--training.local_batch_size=2"), 4),
    (1, (), 6),
)


def _train_until(folder: Path, last: int, *overrides: str) -> None:
    trainer = build_trainer(folder, *SETTINGS, *overrides)
    try:
        for step in range(trainer.state.step + 1, last + 1):
            trainer.train_step(step)
        trainer.save()
    finally:
        trainer.close()


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("settings", "journey"),
    [
        (("--optimizer.name=AdamW",), JOURNEY),
        (("--optimizer.name=Muon",), MUON_JOURNEY),
        (("--optimizer.name=Muon", "--model.name=qwen3_moe"), EXPERTS_JOURNEY),
    ],
    ids=["AdamW", "Muon", "experts"],
)
def test_a_run_that_moves_from_layout_to_layout_equals_one_that_stays(
    workers: dict[int, Workers],
    tmp_path: Path,
    settings: tuple[str, ...],
    journey: tuple[Any, ...],
) -> None:
    last = journey[-1][2]
    more = (*settings, f"--training.steps={last}")
    expected = workers[1].run(train, tmp_path / "stays", *SETTINGS[1:], *more)[0]
    for processes, layout, until in journey:
        workers[processes].run(_train_until, tmp_path / "moves", until, *layout, *more)
    got = read_metrics(tmp_path / "moves")
    assert [record["step"] for record in got] == list(range(1, last + 1))
    for key in ("loss", "grad_norm", "lr", "tokens"):
        wanted = [record[key] for record in expected]
        assert [record[key] for record in got] == pytest.approx(wanted, rel=1e-5), key


def _rounded(array: np.ndarray) -> np.ndarray:
    return torch.from_numpy(array).to(torch.bfloat16).float().numpy()


def test_another_run_begins_with_the_weights_or_goes_on(
    one_process: Workers, tmp_path: Path
) -> None:
    every_2 = ("--checkpoint.enable=true", "--checkpoint.interval=2", "--training.steps=4")
    weights_last = (
        "--checkpoint.last_save_model_only=true",
        "--checkpoint.export_dtype=bfloat16",
    )
    records, first = one_process.run(train_and_gather, tmp_path / "first", *every_2, *weights_last)[
        0
    ]
    checkpoints = tmp_path / "first" / "checkpoint"
    size = {
        step: sum(file.stat().st_size for file in (checkpoints / f"step-{step}").iterdir())
        for step in (2, 4)
    }
    # 4 bytes per parameter, and 8 of the optimizer.
    assert size[2] / size[4] == pytest.approx(6, rel=0.2)

    initial = (f"--checkpoint.initial_load_path={checkpoints}/step-4", "--training.seed=1")
    excluded = ('--checkpoint.exclude_from_loading=["output.*"]',)
    got, second = one_process.run(
        train_and_gather, tmp_path / "second", *every_2, *initial, *excluded
    )[0]
    assert [record["step"] for record in got] == [1, 2, 3, 4]
    for name, array in second["initial weights"].items():
        wanted = _rounded(first["final weights"][name])
        assert np.array_equal(array, wanted) == (name != "output.weight"), name

    initial = (
        f"--checkpoint.initial_load_path={checkpoints}/step-2",
        "--checkpoint.initial_load_model_only=false",
    )
    got, third = one_process.run(train_and_gather, tmp_path / "third", *every_2, *initial)[0]
    for key in ("step", "loss", "grad_norm", "tokens"):
        assert [record[key] for record in got] == [record[key] for record in records[2:]], key
    # Once more: the run's own last step counts, and nothing is left to do.
    got, again = one_process.run(train_and_gather, tmp_path / "third", *every_2, *initial)[0]
    np.testing.assert_equal(again["initial weights"], third["final weights"])
