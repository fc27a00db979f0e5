"""Loads of experts over the steps of a run: skipped steps, validation, resume."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from tests.distributed import Workers
from tests.runs import biases, build_trainer
from titan_lite.models.args import MoEArgs
from titan_lite.models.deepseek import DEEPSEEK_V3
from titan_lite.nn.build_model import build_model
from titan_lite.training.balancing import Balancer
from titan_lite.training.trainer import Trainer

MOE = (
    "--model.name=qwen3_moe",
    "--model.route_bias=true",
    "--model.bias_rate=0.25",
    "--training.nonfinite=skip",
    "--checkpoint.enable=true",
    "--checkpoint.interval=1",
    "--validation.enable=true",
    "--validation.interval=1",
    "--validation.steps=1",
)


def _loads(trainer: Trainer) -> tuple[list[list[int]], list[list[float]]]:
    balancer = trainer.built.train_step.balancer
    assert balancer is not None
    return balancer.state_dict(), [b.tolist() for b in biases(trainer.built.model).values()]


def _spoil(trainer: Trainer, step: int) -> None:
    def spoil(parameter: Any) -> None:
        if trainer.state.step + 1 == step:
            parameter.grad.to_local()[0, 0] = torch.inf

    parameter = dict(trainer.built.model.named_parameters())["layers.1.attention.wo.weight"]
    parameter.register_post_accumulate_grad_hook(spoil)


def _run(folder: Path) -> tuple[list[Any], list[Any], Any]:
    """Loads at step 0 and after each of three steps, the second skipped; then after a resume."""
    trainer = build_trainer(folder, *MOE)
    _spoil(trainer, step=2)
    loads, records = [_loads(trainer)], []
    for step in (1, 2, 3):
        records.append(trainer.train_step(step))
        loads.append(_loads(trainer))
        if step == 2:
            trainer.save()
    trainer.close()
    trainer = build_trainer(folder, *MOE)
    resumed = _loads(trainer)
    trainer.train_step(3)
    again = _loads(trainer)
    trainer.close()
    return loads, records, (resumed, again)


@pytest.mark.distributed
def test_loads_and_biases_follow_applied_steps_alone_and_are_resumed(
    workers: dict[int, Workers], tmp_path: Path
) -> None:
    loads, records, (resumed, again) = workers[1].run(_run, tmp_path)[0]
    (none, _), (first, bias), skipped, last = loads
    assert not any(map(any, none))
    # 8 samples of 64 tokens with 2 experts each; validation is not counted.
    for counts in (*first, *last[0]):
        assert sum(counts) == 8 * 64 * 2
    for counts, of_layer in zip(first, bias, strict=True):
        mean = sum(counts) / len(counts)
        # One that has the mean exactly keeps its bias.
        assert of_layer == [0.25 * ((mean > c) - (mean < c)) for c in counts]
    assert skipped == (first, bias)
    assert last != skipped
    assert resumed == skipped
    assert again == last
    assert records[0]["moe/max_bias"] == 0.25
    assert records[0]["moe/load_max_per_layer"] == pytest.approx(
        [max(counts) / (sum(counts) / len(counts)) for counts in first]
    )


def test_dense_first_blocks_are_not_in_the_metrics_of_experts() -> None:
    args = replace(DEEPSEEK_V3.flavors["debug"], bias_rate=0.0)
    assert isinstance(args, MoEArgs)
    model = build_model(DEEPSEEK_V3, args)
    meshes = cast(Any, SimpleNamespace(ep=SimpleNamespace(size=lambda: 2)))
    balancer = Balancer(model, args, meshes, 1, torch.device("cpu"))
    loads = [[0] * 8, [1] * 8, [4, 4, 0, 0, 0, 0, 0, 0], [8, 0, 0, 0, 0, 0, 0, 0]]
    balancer.load_state_dict(loads)
    record = balancer.metrics()
    assert record["moe/unused_experts_per_layer"] == [0, 6, 7]
    assert record["moe/load_max_per_layer"] == [1, 4, 8]
    assert record["moe/unused_experts"] == 13
    # The first of 2 ranks has all tokens of the last two blocks.
    assert record["moe/rank_load_max"] == 2
    assert record["moe/entropy"] == pytest.approx((1 + 1 / 3 + 0) / 3)
