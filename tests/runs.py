"""Short real runs of the Trainer, for tests: called in workers, or in this process."""

import contextlib
import dataclasses
import json
import resource
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partialmethod
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor

from titan_lite.data.loader import Batch
from titan_lite.data.packing import IGNORED
from titan_lite.models.plan import make_plan
from titan_lite.nn.init import CHECKPOINT_PREFIX
from titan_lite.parallel.pipeline import CAN_SPLIT_BACKWARD
from titan_lite.runtime.distributed import Process
from titan_lite.training.open_run import open_run
from titan_lite.training.trainer import Trainer

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


splits_backward = pytest.mark.skipif(
    not CAN_SPLIT_BACKWARD, reason="schedules that split backward require torch 2.13 or later"
)


@contextlib.contextmanager
def full_disk(size: int) -> Iterator[None]:
    """A limit on the size of files stands for it."""
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, former[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)


def slow_but(quick: Collection[Any], parameters: Iterable[Any]) -> list[Any]:
    """Parameters of a test, all but the quick ones marked slow."""
    return [
        pytest.param(
            *(parameter if isinstance(parameter, tuple) else (parameter,)),
            marks=[pytest.mark.slow] * (parameter not in quick),
        )
        for parameter in parameters
    ]


# Steps whose gradients are compared from the same weights, as those of step 1 are by themselves.
LATER = (3, 6)

# Among weights, those that balance experts in the next step.
COUNTS = "expert counts"

Tensors = dict[str, Any]
Run = tuple[list[dict[str, Any]], dict[str, Tensors]]
"""Records of metrics.jsonl, and whole tensors by moment and name."""
Deviations = dict[str, tuple[float, str]]
"""By quantity, how far off it is at worst, and where."""


def train(folder: Path | str, *overrides: str) -> list[dict[str, Any]]:
    """Trains in every process of the group and returns the records of metrics.jsonl."""
    trainer = build_trainer(folder, *overrides)
    try:
        trainer.train()
    finally:
        trainer.close()
    return read_metrics(folder)


def train_and_gather(
    folder: Path | str,
    *overrides: str,
    mask_labels: bool = False,
    weights: Mapping[int, Tensors] | None = None,
) -> Run:
    """Trains as `train` does; returns whole weights before and after, and gradients of some steps.

    These are step 1, which all layouts of a model start with the same bits, and those of LATER.
    weights: `later_weights` of the run to compare with, from which gradients of LATER are taken,
    after the training; None: the run's own.
    """
    trainer = build_trainer(folder, *overrides)
    if mask_labels:
        trainer.data.batches = masked(trainer.data.batches)
    gathered = {"initial weights": gather(trainer)}
    batches: list[Batch] = []
    trainer.data.batches = _remembered(trainer.data.batches, batches)

    def gather_step(*_: Any) -> None:
        step = trainer.state.step + 1
        if step == 1 or (step in LATER and weights is None):
            gathered[f"gradients of step {step}"] = gather(trainer, gradients=True)
        if step in LATER and weights is None:
            gathered[f"weights before step {step}"] = gather(trainer)

    hook = trainer.built.train_step.optimizer.register_step_pre_hook(gather_step)
    try:
        trainer.train()
        hook.remove()
        gathered["final weights"] = gather(trainer)
        for step, at_step in (weights or {}).items():
            last = step * trainer.plan.micro_steps
            of_step = batches[last - trainer.plan.micro_steps : last]
            gathered[f"gradients of step {step}"] = _gradients_at(trainer, at_step, of_step)
    finally:
        trainer.close()
    return read_metrics(folder), gathered


def later_weights(run: Run) -> dict[int, Tensors]:
    """Weights of a run before each step of LATER that it took."""
    names = {step: f"weights before step {step}" for step in LATER}
    return {step: run[1][name] for step, name in names.items() if name in run[1]}


def _remembered(batches: Iterator[Batch], memory: list[Batch]) -> Iterator[Batch]:
    for batch in batches:
        memory.append(batch)
        yield batch


def _gradients_at(trainer: Trainer, weights: Tensors, batches: list[Batch]) -> Tensors:
    """Gradients of a step from these weights, which it changes."""
    load(trainer.built.model, weights)
    if (balancer := trainer.built.train_step.balancer) is not None:
        balancer.load_state_dict(weights[COUNTS].tolist())
    gathered: Tensors = {}
    hook = trainer.built.train_step.optimizer.register_step_pre_hook(
        lambda *_: gathered.update(gather(trainer, gradients=True))
    )
    trainer.built.train_step(batches, lr=0.0)
    hook.remove()
    return gathered


@torch.no_grad()
def load(model: torch.nn.Module, weights: Tensors) -> None:
    """Gives a model, or the stages of it that are here, these whole tensors."""
    for name, bias in biases(model).items():
        bias.copy_(torch.from_numpy(weights[name]))
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor), name
        array = weights[name.replace(CHECKPOINT_PREFIX, "")]
        # A layout that pads the vocabulary further has more rows, of zeros.
        whole = torch.zeros(parameter.shape, device=parameter.device_mesh.device_type)
        whole[: len(array)] = torch.from_numpy(array)
        local = distribute_tensor(
            whole, parameter.device_mesh, parameter.placements, src_data_rank=None
        ).to_local()
        parameter.to_local().copy_(local)


class Clock:
    """Stands in for a run's clock, and moves only by what is added to `now`."""

    def __init__(self, trainer: Trainer) -> None:
        self.now = time.perf_counter()
        trainer.monitor.meter.clock = trainer.monitor.forward_times._now = self  # type: ignore[method-assign]

    def __call__(self) -> float:
        return self.now


def build_trainer(folder: Path | str, *overrides: str) -> Trainer:
    settings = [*TINY, f"--job.dump_folder={folder}", *overrides]
    if "--compile.enable=true" in overrides and not any("components" in o for o in overrides):
        # A graph less to wait for: tests/parallel/test_compile.py and test_tensor.py compile it.
        settings.append('--compile.components=["model"]')
    return open_run(make_plan(None, settings, Process.from_environment().world_size))


def compiled_by(backend: str) -> AbstractContextManager[Any]:
    """Has blocks compiled by another backend than inductor, which takes half a minute.

    "eager" for what is dynamo's doing, "aot_eager" for what is the partitioner's, which both share.
    """
    compile = partialmethod(torch.nn.Module.compile, backend=backend)
    return mock.patch.object(torch.nn.Module, "compile", compile)


def train_traced(folder: Path | str, *overrides: str) -> list[dict[str, Any]]:
    """Trains as `train` does, compiled with the graphs of dynamo and the partitioner only."""
    with compiled_by("aot_eager"):
        return train(folder, *overrides, "--compile.enable=true")


def masked(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Leaves labels uncounted by the token they follow: another number of them in every sample."""
    for batch in batches:
        tokens, chosen = batch.inputs, batch.inputs[:, 0]
        if batch.pair_labels is not None:
            # A masked language model has the same first token everywhere, and the same mask token.
            tokens, chosen = batch.labels, batch.labels.sum(1)
        labels = batch.labels.masked_fill(tokens % 3 == 0, IGNORED)
        # One sample in four has hardly anything left.
        labels[chosen % 4 == 0, 2:] = IGNORED
        yield dataclasses.replace(batch, labels=labels)


def read_metrics(folder: Path | str) -> list[dict[str, Any]]:
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def gather(trainer: Trainer, *, gradients: bool = False) -> Tensors:
    """Whole tensors of the whole model, from all stages of a pipeline."""
    arrays = whole(trainer.built.model, gradients=gradients)
    if (balancer := trainer.built.train_step.balancer) is not None and not gradients:
        arrays[COUNTS] = balancer.counts_LE.cpu().numpy().copy()
    if trainer.built.train_step.meshes.pp is None:
        return arrays
    stages: list[Tensors] = [{}] * trainer.plan.dims.pp
    dist.all_gather_object(stages, arrays, group=trainer.built.train_step.meshes.pp)
    return {name: array for stage in stages for name, array in stage.items()}


@torch.no_grad()
def whole(model: torch.nn.Module, *, gradients: bool = False) -> Tensors:
    arrays = {}
    for name, parameter in model.named_parameters():
        tensor = parameter.grad if gradients else parameter
        assert isinstance(tensor, DTensor), (name, tensor)
        arrays[name.replace(CHECKPOINT_PREFIX, "")] = tensor.full_tensor().cpu().numpy().copy()
    if not gradients:
        arrays |= {name: bias.cpu().numpy().copy() for name, bias in biases(model).items()}
    return arrays


def biases(model: torch.nn.Module) -> Tensors:
    """Those that balance experts."""
    return {
        name.replace(CHECKPOINT_PREFIX, ""): buffer
        for name, buffer in model.named_buffers()
        if name.endswith("router.bias")
    }


def deviations(got: Run, expected: Run) -> Deviations:
    """How far two runs are apart in each quantity, and where: the step, or the parameter.

    Losses, those of validation too, and gradient norms relative to the expected ones. Weights to
    the largest one of the tensor; gradients to that plus a quarter of the largest one of the model,
    since some are small sums of terms that cancel, and have the rounding of the terms.
    """
    (records, tensors), (expected_records, expected_tensors) = got, expected
    for key in ("step", "lr", "tokens", "moe/entropy_per_layer", "moe/max_bias"):
        assert [r.get(key) for r in records] == [r.get(key) for r in expected_records], key
    actual = {}
    for key in ("loss", "grad_norm"):
        # A record has the loss of validation where there was one.
        off = [
            float(np.max([abs(r[k] / e[k] - 1) for k in (key, f"validation/{key}") if k in e]))
            for r, e in zip(records, expected_records, strict=True)
        ]
        actual[key] = _worst(off, [f"step {r['step']}" for r in records])
        actual[f"{key} of step 1"] = off[0], "step 1"
    for moment, by_name in tensors.items():
        references = expected_tensors[moment]
        assert by_name.keys() == references.keys()
        if moment == "final weights" and COUNTS in references:
            np.testing.assert_array_equal(by_name[COUNTS], references[COUNTS])
        terms = 0.0
        if moment.startswith("gradients"):
            terms = 0.25 * max(np.abs(array).max() for array in references.values())
        off = [_distance(array, references[name], terms) for name, array in by_name.items()]
        actual[moment] = _worst(off, list(by_name))
    return actual


def _distance(got: Any, expected: Any, terms: float) -> float:
    # Rows beyond the expected ones pad a vocabulary, and should be zero.
    rows = [(0, len(got) - len(expected)), *[(0, 0)] * (got.ndim - 1)]
    # Biases start as zeros.
    size = np.abs(expected).max() + terms or 1.0
    return float(np.abs(got - np.pad(expected, rows)).max() / size)


def _worst(values: list[float], places: list[str]) -> tuple[float, str]:
    index = int(np.argmax(values))  # the first NaN, where there is one
    return values[index], places[index]


def exceeding(
    actual: dict[str, tuple[float, str]], tolerances: dict[str, float]
) -> dict[str, tuple[float, str]]:
    """The quantities of `deviations` that are beyond their tolerances, or NaN."""
    return {name: actual[name] for name, most in tolerances.items() if not actual[name][0] <= most}
