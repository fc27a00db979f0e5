"""Training on masked tokens and pairs: one loss in every layout, what it is made of, and resume."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.distributed import Workers
from tests.parallel.matrix import TOLERANCES_OF_3_STEPS
from tests.runs import (
    Run,
    build_trainer,
    deviations,
    exceeding,
    later_weights,
    read_metrics,
    train,
    train_and_gather,
)
from titan_lite.data.loader import Batch
from titan_lite.models.plan import make_plan
from titan_lite.nn.document_attention import dense_mask
from titan_lite.training.open_run import open_run

BERT = (
    "--model.name=megatron_bert",
    "--training.steps=3",
    "--data.num_streams=2",
    "--masked_lm.short_seq_prob=0.5",
)
VALIDATE = ("--validation.enable=true", "--validation.interval=3", "--validation.steps=1")
LABELLED, HALF = "--training.loss_positions=labelled", "--training.local_batch_size=4"
QUARTER = "--training.local_batch_size=2"
LAYOUTS = (
    (1, (LABELLED, HALF)),
    (2, (LABELLED, "--parallel.tp=2")),
    (2, (LABELLED, "--parallel.pp=2", QUARTER)),
)
OWN = ("masked_lm_loss", "next_sentence_loss", "next_sentence_accuracy")


@pytest.fixture(scope="module")
def expected(workers: dict[int, Workers], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Returns the result of one process, at all positions."""
    folder = tmp_path_factory.mktemp("one")
    return workers[1].run(train_and_gather, folder, *BERT, *VALIDATE)[0]


def _told(run: Run) -> Run:
    """Without the biases of keys: a softmax does not see them, and their gradient is rounding."""
    records, gathered = run
    return records, {
        moment: {name: array for name, array in arrays.items() if not name.endswith("wk.bias")}
        for moment, arrays in gathered.items()
    }


@pytest.mark.distributed
@pytest.mark.parametrize(("world_size", "settings"), LAYOUTS)
def test_every_layout_trains_and_validates_what_one_process_does(
    world_size: int,
    settings: tuple[str, ...],
    expected: Run,
    workers: dict[int, Workers],
    tmp_path: Path,
) -> None:
    overrides = (*BERT, *VALIDATE, *settings)
    train = partial(train_and_gather, weights=later_weights(expected))
    got = workers[world_size].run(train, tmp_path, *overrides)[0]
    assert exceeding(deviations(_told(got), _told(expected)), TOLERANCES_OF_3_STEPS) == {}
    keys = [key for key in expected[0][-1] if key in OWN or key.startswith("validation/")]
    assert len(keys) == len(OWN) + 5
    for key in keys:
        assert got[0][-1][key] == pytest.approx(expected[0][-1][key], rel=1e-4)


def _first_step(folder: Path, *overrides: str) -> dict[str, Any]:
    """Returns the model's arguments, and both losses and all counts from whole logits."""
    trainer = build_trainer(folder, *overrides, "--training.steps=1")
    batch, calls = next(trainer.data.batches), []
    trainer.data.batches = iter([batch])
    hook = trainer.built.model.register_forward_pre_hook(
        lambda _model, inputs, kwargs: calls.append((inputs[0], kwargs)), with_kwargs=True
    )
    with torch.no_grad():
        prepared = trainer.built.train_step.inputs
        inputs, kwargs = prepared.arguments(batch, prepared.loss_terms(torch.ones(2)))
        kept: list[torch.Tensor] = []
        others = {key: value for key, value in kwargs.items() if key not in ("head_loss",)}
        others["pair_loss"] = lambda logits: kept.append(logits) or torch.zeros(())
        logits = trainer.built.model(inputs, **others)
    trainer.train()
    hook.remove()
    trainer.close()
    (pairs,) = kept
    assert batch.pair_labels is not None
    return {
        "batch": batch,
        "inputs": calls[1][0],
        "context": calls[1][1]["context"],
        "tokens": F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten()).item(),
        "pairs": F.cross_entropy(pairs, batch.pair_labels).item(),
        "right": (pairs.argmax(1) == batch.pair_labels).float().mean().item(),
        "record": read_metrics(folder)[0],
    }


@pytest.mark.distributed
def test_the_loss_is_the_mean_over_hidden_tokens_and_the_mean_over_pairs(
    workers: dict[int, Workers], tmp_path: Path
) -> None:
    actual = workers[1].run(_first_step, tmp_path, *BERT)[0]
    record, batch = actual["record"], actual["batch"]
    assert isinstance(batch, Batch)
    assert record["loss"] == pytest.approx(actual["tokens"] + actual["pairs"], rel=1e-5)
    own = [actual["tokens"], actual["pairs"], actual["right"]]
    assert [record[key] for key in OWN] == pytest.approx(own, rel=1e-5)
    # Padding, of which there is some, is not counted in tokens.
    assert batch.documents is not None
    assert record["tokens"] == (batch.documents == 0).sum() < batch.inputs.numel()
    assert record["iterations_per_second"] == pytest.approx(1 / record["seconds_per_step"])
    # Content sees content on both sides, and padding sees padding.
    assert torch.equal(actual["inputs"], batch.inputs)
    assert torch.equal(actual["context"].token_types_BS, batch.token_types)
    mask = dense_mask(batch.documents, torch.arange(64), torch.float32, causal=False)
    assert torch.equal(actual["context"].mask, mask)
    assert mask[0, 0, 0, 2] == 0


def _flops(folder: Path, *overrides: str) -> tuple[int, int]:
    """Returns the FLOPs of the model, and of its stages."""
    trainer = build_trainer(folder, *overrides)
    trainer.close()
    return trainer.built.flops.model, sum(stage.flops for stage in trainer.built.stages)


@pytest.mark.distributed
def test_flops_of_positions_without_a_label_are_counted_only_where_they_are_computed(
    workers: dict[int, Workers], tmp_path: Path
) -> None:
    every, labelled = (
        workers[1].run(_flops, tmp_path, *BERT, *settings)[0] for settings in ((), (LABELLED,))
    )
    assert every[0] - labelled[0] == 6 * round(0.85 * 2048 * 64)
    # The head's bias counts, too.
    assert every[1] - labelled[1] == pytest.approx(6 * 0.85 * 2048 * 65)


def _train_in_two(folder: Path) -> list[dict[str, Any]]:
    settings = (*BERT, "--training.steps=4", LABELLED)
    train(folder / "whole", *settings)
    saved = (*settings, "--checkpoint.enable=true", "--checkpoint.interval=2")
    first = build_trainer(folder / "parts", *saved)
    first.stop.signal = "SIGTERM"
    first.train()
    first.close()
    return [*train(folder / "parts", *saved), *read_metrics(folder / "whole")]


@pytest.mark.distributed
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(
    workers: dict[int, Workers], tmp_path: Path
) -> None:
    records = workers[1].run(_train_in_two, tmp_path)[0]
    keys = ("step", "loss", "grad_norm", "tokens", *OWN)
    numbers = [[record[key] for key in keys] for record in records]
    assert [n[0] for n in numbers] == [1, 2, 3, 4] * 2
    assert numbers[:4] == numbers[4:]


@pytest.mark.distributed
def test_without_pairs_their_loss_is_zero_and_in_float16_both_losses_are_unscaled(
    expected: Run, workers: dict[int, Workers], tmp_path: Path
) -> None:
    settings = (*BERT, "--training.steps=1")
    alone = workers[1].run(train, tmp_path / "alone", *settings, "--masked_lm.next_sentence=false")[
        0
    ]
    assert not set(OWN) & alone[0].keys()
    assert alone[0]["loss"] == pytest.approx(7.7, abs=0.2)
    half = workers[1].run(train, tmp_path / "half", *settings, "--training.param_dtype=float16")[0]
    for key in ("loss", *OWN):
        assert half[0][key] == pytest.approx(expected[0][0][key], rel=0.01)


def _train_preset(folder: Path) -> list[dict[str, Any]]:
    small = ("model.num_layers=2", "training.steps=40", "lr_scheduler.warmup_steps=4")
    path = Path(__file__).parent.parent / "train_configs" / "debug_bert.toml"
    overrides = [f"--{setting}" for setting in (*small, f"job.dump_folder={folder}")]
    plan = make_plan(path, [*overrides, "--training.local_batch_size=8"], 1)
    trainer = open_run(plan)
    trainer.train()
    trainer.close()
    return read_metrics(folder)


@pytest.mark.distributed
@pytest.mark.slow
def test_the_loss_of_hidden_tokens_falls_on_the_bundled_corpus(
    workers: dict[int, Workers], tmp_path: Path
) -> None:
    first, *_, last = workers[1].run(_train_preset, tmp_path)[0]
    assert first["masked_lm_loss"] > 7.5
    assert last["masked_lm_loss"] < 6.6
