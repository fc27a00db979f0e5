"""The moving average of the weights: its formula, its layouts, and who uses it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor

from tests.distributed import Workers
from tests.runs import build_trainer, load, read_metrics, whole
from titan_lite import cli
from titan_lite.config.schema import EMA
from titan_lite.optim.ema import WeightAverage

SETTINGS = (
    "--ema.enable=true",
    "--ema.decay=0.5",
    "--training.steps=4",
    "--checkpoint.enable=true",
    "--checkpoint.interval=2",
    "--validation.enable=true",
    "--validation.interval=4",
    "--validation.steps=1",
)


def test_a_step_moves_the_average_and_a_skipped_one_does_not() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)
    average = WeightAverage(EMA(enable=True, decay=0.75, start_step=1), model)
    got = []
    for step, weight, is_applied in ((1, 2.0, True), (2, 4.0, True), (3, 8.0, False)):
        nn.init.constant_(model.weight, weight)
        average.update(step, torch.tensor(is_applied))
        got.append(average.tensors["weight"].item())
    # Up to start_step that of the weights; then 0.75 * 2 + 0.25 * 4.
    assert got == [2, 2.5, 2.5]
    with average.swapped():
        assert (model.weight.item(), average.tensors["weight"].item()) == (2.5, 8)
    assert (model.weight.item(), average.tensors["weight"].item()) == (8, 2.5)


def test_a_tied_weight_has_one_average_under_both_names() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    average = WeightAverage(EMA(enable=True), model)
    assert average.tensors["0.weight"] is average.tensors["1.weight"]
    before = model[0].weight.clone()
    with average.swapped():
        pass
    assert (model[0].weight == before).all()


# The router's bias is not trained by gradients.
DEEPSEEK = ("--model.name=deepseek_v3", "--model.bias_rate=0.01", "--training.seq_len=32")


def _averages(trainer: Any) -> dict[str, np.ndarray]:
    return {
        name: (t.full_tensor() if isinstance(t, DTensor) else t).numpy().copy()
        for name, t in trainer.built.train_step.average.tensors.items()
    }


def _train(folder: Path, steps: int, *overrides: str) -> tuple[Any, Any, Any, float]:
    """Averages at the start and the end, the last weights, and the loss that the average has."""
    trainer = build_trainer(folder, *SETTINGS, *overrides)
    start = _averages(trainer)
    for step in range(trainer.state.step + 1, steps + 1):
        trainer.train_step(step)
    trainer.save()
    end, weights = _averages(trainer), whole(trainer.built.model)
    load(trainer.built.model, end)
    trainer.built.train_step.average = None
    assert trainer.data.held_out is not None
    sums = trainer.built.train_step.evaluate(trainer.data.held_out.batches)
    loss = trainer.built.objective.validation(sums, trainer.data.held_out)
    trainer.close()
    return start, end, weights, loss["validation/loss"]


@pytest.mark.distributed
def test_the_average_is_the_same_in_every_layout_and_resumed_bit_for_bit(
    workers: dict[int, Workers], tmp_path: Path
) -> None:
    _, one, weights, _ = workers[1].run(_train, tmp_path / "one", 4)[0]
    first = workers[2].run(_train, tmp_path / "two", 2, "--training.local_batch_size=4")[0]
    resumed = workers[2].run(
        _train, tmp_path / "two", 4, "--parallel.tp=2", "--training.local_batch_size=8"
    )[0]
    for name, average in one.items():
        assert (first[1][name] == resumed[0][name]).all(), name
        # Adam divides by second moments, small ones of which are mostly rounding; a step is 1e-3.
        np.testing.assert_allclose(resumed[1][name], average, rtol=1e-4, atol=1e-5, err_msg=name)
    assert (one["norm.weight"] != weights["norm.weight"]).any()
    records = read_metrics(tmp_path / "two")
    assert records[-1]["validation/loss"] == pytest.approx(resumed[3], rel=1e-6)


def _export(folder: Path, *overrides: str) -> tuple[Any, Any]:
    trainer = build_trainer(
        folder, *SETTINGS, "--ema.export=true", "--checkpoint.last_save_hf=true", *overrides
    )
    trainer.train()
    averages, weights = _averages(trainer), whole(trainer.built.model)
    trainer.close()
    return averages, weights


def test_the_average_is_exported_on_request(one_process: Workers, tmp_path: Path) -> None:
    averages, weights = one_process.run(_export, tmp_path)[0]
    (file,) = (tmp_path / "checkpoint" / "hf").glob("*.safetensors")
    exported = load_file(file)["model.norm.weight"].numpy()
    assert (exported == averages["norm.weight"]).all()
    assert (exported != weights["norm.weight"]).any()
    source = f"{tmp_path}/checkpoint/step-4"
    for options, expected in ((["--average"], averages), ([], weights)):
        target = tmp_path / f"converted{len(options)}"
        assert cli.main(["convert", "dcp-to-hf", source, str(target), *options]) == 0
        converted = load_file(target / "model.safetensors")["model.norm.weight"].numpy()
        assert (converted == expected["norm.weight"]).all()


def test_what_has_no_average_is_exported_as_it_is(one_process: Workers, tmp_path: Path) -> None:
    averages, weights = one_process.run(_export, tmp_path, *DEEPSEEK)[0]
    (file,) = (tmp_path / "checkpoint" / "hf").glob("*.safetensors")
    exported = load_file(file)
    bias = weights["layers.1.feed_forward.router.bias"]
    assert (exported["model.layers.1.mlp.gate.e_score_correction_bias"].numpy() == bias).all()
    assert bias.any()
    norm = exported["model.norm.weight"].numpy()
    assert (norm == averages["norm.weight"]).all()


def _begin(folder: Path, *overrides: str) -> bool:
    """Returns whether averages and weights are the same before the first step."""
    trainer = build_trainer(folder, *SETTINGS, *overrides)
    averages, weights = _averages(trainer), whole(trainer.built.model)
    trainer.close()
    return all((averages[name] == weights[name]).all() for name in weights)


def test_a_checkpoint_without_an_average_begins_one_and_exports_none(
    one_process: Workers, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one_process.run(_train_without, tmp_path)
    convert = ["convert", "dcp-to-hf", f"{tmp_path}/checkpoint/step-2", f"{tmp_path}/hf"]
    assert cli.main([*convert, "--average"]) == 2
    assert (
        "step-2 has no average of the weights: a run saves one with ema" in capsys.readouterr().err
    )
    assert not list(tmp_path.glob("hf*"))
    assert one_process.run(_begin, tmp_path, "--checkpoint.load_step=2")[0]


def _train_without(folder: Path) -> None:
    trainer = build_trainer(folder, *SETTINGS, "--ema.enable=false")
    for step in (1, 2):
        trainer.train_step(step)
    trainer.save()
    trainer.close()
