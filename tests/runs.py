"""Short real runs of the Trainer, for tests: called in workers, or in this process."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from titan_lite.config.load import load_config
from titan_lite.data.loader import Batch
from titan_lite.loss import IGNORE_INDEX
from titan_lite.models.rules import check
from titan_lite.parallel.init_weights import CHECKPOINT_PREFIX
from titan_lite.runtime.distributed import Process
from titan_lite.trainer import Trainer

# Small enough for 20 steps in a few seconds, with grouped heads and several of everything.
TINY = (
    "--model.dim=64",
    "--model.num_layers=2",
    "--model.ffn_dim=128",
    "--training.seq_len=64",
    "--training.steps=20",
    "--training.local_batch_size=8",
    "--training.global_batch_size=8",
    "--training.param_dtype=float32",
    "--optimizer.lr=1e-3",
    "--lr_scheduler.warmup_steps=2",
    "--data.num_streams=4",
    "--data.shuffle_buffer=64",
    "--metrics.log_freq=1",
    "--metrics.enable_tensorboard=false",
    # Measuring the CPU's own peak would cost every run a quarter of a second.
    "--metrics.peak_tflops=1.0",
)


def train(folder: Path | str, *overrides: str, mask_labels: bool = False) -> list[dict[str, Any]]:
    """Trains in every process of the group and returns the records of metrics.jsonl."""
    trainer = build_trainer(folder, *overrides)
    if mask_labels:
        trainer.batches = masked(trainer.batches)
    try:
        trainer.train()
    finally:
        trainer.close()
    return read_metrics(folder)


def train_and_gather(
    folder: Path | str, *overrides: str
) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """As `train`, and whole tensors as arrays: weights before and after, gradients of two steps."""
    trainer = build_trainer(folder, *overrides)
    gathered = {"initial weights": whole(trainer.model)}

    def gather_gradients(*_: Any) -> None:
        step = trainer.state.step + 1
        if step in (1, 5):
            gathered[f"gradients of step {step}"] = whole(trainer.model, gradients=True)

    trainer.optimizer.register_step_pre_hook(gather_gradients)
    trainer.train()
    trainer.close()
    return read_metrics(folder), gathered | {"final weights": whole(trainer.model)}


def build_trainer(folder: Path | str, *overrides: str) -> Trainer:
    loaded = load_config(None, [*TINY, f"--job.dump_folder={folder}", *overrides])
    return Trainer(loaded, check(loaded, Process.from_environment().world_size))


def masked(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Leaves labels uncounted by the token they follow: another number of them in every sample."""
    for batch in batches:
        labels = batch.labels.masked_fill(batch.inputs % 3 == 0, IGNORE_INDEX)
        # One sample in four has hardly anything left.
        labels[batch.inputs[:, 0] % 4 == 0, 2:] = IGNORE_INDEX
        yield dataclasses.replace(batch, labels=labels)


def read_metrics(folder: Path | str) -> list[dict[str, Any]]:
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@torch.no_grad()
def whole(model: torch.nn.Module, *, gradients: bool = False) -> dict[str, Any]:
    arrays = {}
    for name, parameter in model.named_parameters():
        tensor = parameter.grad if gradients else parameter
        assert isinstance(tensor, DTensor), (name, tensor)
        arrays[name.replace(CHECKPOINT_PREFIX, "")] = tensor.full_tensor().numpy().copy()
    return arrays
