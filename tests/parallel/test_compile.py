"""Recompilations are reported.

That compiled blocks are one graph and train the same model: test_matrix.py, test_context.py.
"""

import dataclasses
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.distributed import Workers
from tests.runs import build_trainer, compiled_by, train
from titan_lite.config.schema import Compile
from titan_lite.data.loader import Batch
from titan_lite.parallel.compile import Compilations


def shortened(batches: Iterator[Batch], from_step: int) -> Iterator[Batch]:
    """Batches of half the length from a step on."""
    for step, batch in enumerate(batches, start=1):
        length = batch.inputs.shape[1] // (2 if step >= from_step else 1)
        yield dataclasses.replace(
            batch, inputs=batch.inputs[:, :length], labels=batch.labels[:, :length]
        )


def _warnings_of_shortened(folder: Path, *overrides: str) -> list[str]:
    warnings = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("titan_lite").addHandler(handler)
    with compiled_by("eager"):
        trainer = build_trainer(folder, *overrides)
    trainer.data.batches = shortened(trainer.data.batches, from_step=4)
    trainer.train()
    trainer.close()
    logging.getLogger("titan_lite").removeHandler(handler)
    return warnings


def test_by_default_the_loss_is_compiled_with_the_blocks(
    one_process: Workers, tmp_path: Path
) -> None:
    steps = "--training.steps=3"
    components = f"--compile.components={json.dumps(Compile().components)}"
    eager = one_process.run(train, tmp_path / "eager", steps)[0]
    folder = tmp_path / "compiled"
    compiled = one_process.run(train, folder, steps, "--compile.enable=true", components)[0]
    for key in ("loss", "grad_norm"):
        assert [r[key] for r in compiled] == pytest.approx([r[key] for r in eager], rel=1e-6)
    applied = json.loads((folder / "run.json").read_text())["applied"]
    assert applied["compiled_graphs"] == 2


def test_a_recompilation_is_warned_about_with_its_reason(
    one_process: Workers, tmp_path: Path
) -> None:
    settings = ("--training.steps=6", "--compile.enable=true")
    (warning,) = one_process.run(_warnings_of_shortened, tmp_path, *settings)[0]
    assert warning.startswith("Step 4 recompiled (1 times so far since start-up): ")
    assert "size mismatch at index 1. expected 64, actual 32" in warning


def test_recompilations_of_the_warm_up_are_not_counted(one_process: Workers) -> None:
    recompilations, graphs = one_process.run(_recompile_in_every_second_step)[0]
    assert recompilations == [0, 0, 0, 1, 1, 2]
    assert graphs == 4


def _recompile_in_every_second_step() -> tuple[list[int], int]:
    torch.compiler.reset()
    compiled = torch.compile(torch.sin, backend="eager", dynamic=False)
    compilations = Compilations()
    actual = []
    for step, size in enumerate((1, 2, 2, 3, 3, 4), start=1):
        compiled(torch.zeros(size))
        compilations.after_step(step)
        actual.append(compilations.recompilations)
    return actual, compilations.graphs
