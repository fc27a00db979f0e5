"""build_training on its own: a step without a run's data, folders and sinks."""

import math

import torch

from tests.distributed import Workers
from tests.runs import TINY
from titan_lite.data.loader import Batch
from titan_lite.models.plan import make_plan
from titan_lite.runtime.distributed import Process
from titan_lite.training.meta_model import build_whole_model
from titan_lite.training.setup import build_training


def _losses_of_two_steps() -> list[float]:
    process = Process.from_environment()
    plan = make_plan(None, TINY, process.world_size)
    built = build_training(plan, process, build_whole_model(plan))
    tokens = torch.arange(8 * 65).reshape(8, 65) % plan.args.vocab_size
    batch = Batch(inputs=tokens[:, :-1], labels=tokens[:, 1:])
    return [built.train_step([batch], lr=1e-2).loss.item() for _ in range(2)]


def test_a_training_that_is_built_directly_takes_steps(one_process: Workers) -> None:
    first, second = one_process.run(_losses_of_two_steps)[0]
    # Predictions of the initial weights are nearly uniform over the vocabulary.
    assert abs(first - math.log(2048)) < 0.5
    assert second < first
