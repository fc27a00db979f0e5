"""Messages of tensor parallel for the loss."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import Workers
from tests.runs import build_trainer, train
from titan_lite.config.load import ConfigError
from titan_lite.training import loss

TP2 = "--parallel.tp=2"


def _train_and_watch(folder: Path, *overrides: str) -> tuple[list[dict[str, Any]], set[torch.Size]]:
    """Records, and the shapes of the logits that a rank gathers."""
    gathered = set()
    all_gather = loss.all_gather_single

    def watching(output: torch.Tensor, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if tensor.dtype == torch.float32 and tensor.ndim == 2:
            gathered.add(tensor.shape)
        return all_gather(output, tensor, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "all_gather_single", watching)
        return train(folder, "--training.steps=4", "--training.loss_chunks=8", *overrides), gathered


@pytest.mark.distributed
def test_the_loss_is_computed_on_split_logits_unless_they_are_gathered(
    workers: dict[int, Workers], tmp_path: Path
) -> None:
    split, gathered = workers[2].run(_train_and_watch, tmp_path / "split", TP2)[0]
    assert gathered == set()
    whole, gathered = workers[2].run(
        _train_and_watch, tmp_path / "whole", TP2, "--parallel.loss_parallel=false"
    )[0]
    # 8 samples of 64 tokens in 8 chunks, half of the 2048 tokens of the vocabulary.
    assert gathered == {torch.Size([64, 1024])}
    for key in ("loss", "grad_norm"):
        assert [r[key] for r in whole] == pytest.approx([r[key] for r in split], rel=1e-6)


@pytest.mark.distributed
@pytest.mark.parametrize("loss_parallel", ["true", "false"])
def test_a_compiled_loss_is_the_same_over_a_split_vocabulary(
    loss_parallel: str, workers: dict[int, Workers], tmp_path: Path
) -> None:
    settings = (TP2, "--training.steps=3", f"--parallel.loss_parallel={loss_parallel}")
    eager = workers[2].run(train, tmp_path / "eager", *settings)[0]
    compiled = workers[2].run(
        train,
        tmp_path / "compiled",
        *settings,
        "--compile.enable=true",
        '--compile.components=["loss"]',
    )[0]
    for key in ("loss", "grad_norm"):
        assert [r[key] for r in compiled] == pytest.approx([r[key] for r in eager], rel=1e-6)


def test_a_parameter_that_no_row_of_the_plan_splits_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    with pytest.raises(
        ConfigError,
        match=r"parallel.tp +\(command line\): parallel.tp cannot split "
        r"layers.0.attention.q_norm.weight: it matches 0 rows of the family's tp_plan; exactly 1",
    ):
        build_trainer(tmp_path, TP2, "--model.qk_norm=true")
