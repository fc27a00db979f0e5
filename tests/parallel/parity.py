"""Runs the cases of the matrix, on GPUs where there are enough, and compares them with one process.

Valid tokens are uneven over samples, and so over ranks and micro-batches, in all of them.
"""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import Workers
from tests.parallel.matrix import (
    BATCH,
    DEEPSEEK,
    EVERYWHERE,
    TRACED,
    Case,
    as_overrides,
)
from tests.runs import Deviations, Run, compiled_by, deviations, later_weights, train_and_gather

TRAIN = partial(train_and_gather, mask_labels=True)


class Parity:
    """Holds the runs of one process, each of which serves many cases."""

    def __init__(
        self,
        workers: Mapping[int, Workers],
        gpu_workers: Mapping[int, Workers],
        folders: pytest.TempPathFactory,
    ) -> None:
        self.workers, self.gpu_workers, self.folders = workers, gpu_workers, folders
        self.one_process_runs: dict[Any, Run] = {}
        self.num_gpus = torch.cuda.device_count()

    def deviations(self, case: Case, train: Callable[..., Run] = TRAIN) -> Deviations:
        """Returns a case's result from one process; `train` is called in each of its processes."""
        on_gpus = case.world_size <= self.num_gpus
        workers = (self.gpu_workers if on_gpus else self.workers)[case.world_size]
        overrides = as_overrides(*EVERYWHERE, *case.settings, *case.alike)
        folder = self.folders.mktemp("case")
        expected = self._one_process(case.alike, on_gpus)
        train = partial(train, weights=later_weights(expected))
        if case.execution == TRACED:
            train = partial(_traced, train)
        got = workers.run(train, folder, *overrides)[0]
        if case.execution != "eager":
            # Equal blocks share a graph; DeepSeek's first one is dense.
            assert _applied(folder)["compiled_graphs"] == 1 + (case.alike == DEEPSEEK)
        return deviations(got, expected)

    def of_precision(self, case: Case) -> Deviations:
        """Returns one process's deviation with the case's shared settings, in float32."""
        on_gpu = case.world_size <= self.num_gpus
        return deviations(self._one_process(case.alike, on_gpu), self._one_process((), on_gpu))

    def _one_process(self, alike: tuple[str, ...], on_gpu: bool) -> Run:
        # On the kind of device of the case: each kind draws other weights from a seed.
        key = (alike, on_gpu)
        if key not in self.one_process_runs:
            worker = (self.gpu_workers if on_gpu else self.workers)[1]
            settings = (*EVERYWHERE, f"training.local_batch_size={BATCH}", *alike)
            run = worker.run(TRAIN, self.folders.mktemp("one_process"), *as_overrides(*settings))
            self.one_process_runs[key] = run[0]
        return self.one_process_runs[key]


def _traced(train: Callable[..., Run], *arguments: Any) -> Run:
    with compiled_by(TRACED):
        return train(*arguments)


def _applied(folder: Path) -> dict[str, Any]:
    applied: dict[str, Any] = json.loads((folder / "run.json").read_text())["applied"]
    return applied
