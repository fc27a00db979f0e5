"""Async tensor parallel: the compiler's rewrite happens, is counted, and changes no number.

Symmetric memory is a GPU's. Here torch's own fallbacks of the fused operations stand in for its
kernels, so that the rewrite runs on the CPU as it does there.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
from torch.distributed._functional_collectives import all_gather_tensor
from torch.distributed.device_mesh import init_device_mesh

from tests.distributed import Workers
from tests.runs import build_trainer, train
from titan_lite.config.load import ConfigError
from titan_lite.parallel.async_tp import apply_async_tp, check_async_tp, count_fused

TP2 = ("--parallel.tp=2", "--training.steps=3")
ASYNC = ("--compile.enable=true", "--parallel.async_tp=true")


@contextmanager
def kernels_on_cpu(*, rewrite: bool = True) -> Iterator[None]:
    """Registers the fallbacks as CPU kernels; without `rewrite` the pass finds no NCCL."""
    fallbacks = ("fused_all_gather_matmul", "fused_matmul_reduce_scatter")
    with ExitStack() as stack:
        library = stack.enter_context(torch.library._scoped_library("symm_mem", "IMPL"))
        for name in fallbacks:
            library.impl(name, getattr(symmetric_memory, f"_{name}_fallback"), "CPU")
        stack.enter_context(symmetric_memory._test_mode())
        stack.enter_context(mock.patch.object(dist, "is_nccl_available", return_value=rewrite))
        yield


def _train_fused(folder: Path, *overrides: str) -> Any:
    with kernels_on_cpu():
        return train(folder, *TP2, *ASYNC, *overrides)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "all_gather_matmuls", "matmul_reduce_scatters"),
    [
        # Into attention and feed-forward, and in backward into their output projections; out of
        # both. Backward's scatter sums of several matmuls (of q, k and v): not fused.
        ("llama", 4, 2),
        # Only in attention: experts work on the rank's part of the sequence.
        ("qwen3_moe", 2, 1),
    ],
)
def test_collectives_are_fused_with_matmuls_and_the_numbers_are_the_same(
    family: str,
    all_gather_matmuls: int,
    matmul_reduce_scatters: int,
    workers: dict[int, Workers],
    tmp_path: Path,
) -> None:
    name = f"--model.name={family}"
    plain = workers[2].run(train, tmp_path / "plain", *TP2, name)[0]
    fused = workers[2].run(_train_fused, tmp_path / "fused", name)[0]
    for key in ("loss", "grad_norm"):
        assert [r[key] for r in fused] == pytest.approx([r[key] for r in plain], rel=1e-5)
    applied = json.loads((tmp_path / "fused" / "run.json").read_text())["applied"]
    assert applied["fused_all_gather_matmuls"] == all_gather_matmuls
    assert applied["fused_matmul_reduce_scatters"] == matmul_reduce_scatters
    # The next run of these processes does not inherit the rewrite.
    assert workers[2].run(_rewrite_after_a_run_without, tmp_path / "after") == [False, False]


def _rewrite_after_a_run_without(folder: Path) -> bool:
    from torch._inductor import config

    build_trainer(folder, *TP2, "--compile.enable=true").close()
    return config._micro_pipeline_tp or config.post_grad_custom_post_pass is not None


@pytest.mark.distributed
def test_graphs_from_inductors_cache_are_counted_too(workers: dict[int, Workers]) -> None:
    compiled, again = workers[2].run(_count_in_a_graph_compiled_twice)[0]
    counts = {"fused_all_gather_matmuls": 1, "fused_matmul_reduce_scatters": 0}
    assert compiled[1] == counts
    assert again == (True, counts)


def _count_in_a_graph_compiled_twice() -> list[tuple[bool, dict[str, int]]]:
    from torch._dynamo.utils import counters

    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    group = mesh.get_group()
    actual = []
    with kernels_on_cpu(), torch.no_grad():
        for _ in range(2):
            torch.compiler.reset()
            apply_async_tp(mesh, enable=True)
            hits = counters["inductor"]["fxgraph_cache_hit"]
            torch.compile(lambda x, w: all_gather_tensor(x, 0, group) @ w, fullgraph=True)(
                torch.ones(8, 16), torch.ones(16, 4)
            )
            actual.append((counters["inductor"]["fxgraph_cache_hit"] > hits, count_fused()))
    apply_async_tp(mesh, enable=False)
    return actual


@pytest.mark.distributed
def test_a_rewrite_that_fuses_nothing_is_an_error_after_the_first_step(
    workers: dict[int, Workers], tmp_path: Path
) -> None:
    message = workers[2].run(_train_unfused, tmp_path)[0]
    assert message == (
        "applied features do not match the configuration: parallel.async_tp is true, but the "
        "compiler fused 0 all-gather-matmuls and 0 matmul-reduce-scatters; both must be above 0. "
        "Set parallel.async_tp = false"
    )


def _train_unfused(folder: Path) -> str:
    # Another batch than above, whose graphs are in inductor's cache, rewritten.
    batch = ("--training.local_batch_size=2", "--training.global_batch_size=2")
    with kernels_on_cpu(rewrite=False):
        try:
            train(folder, *TP2, *ASYNC, *batch)
        except RuntimeError as error:
            return str(error)
    return "no error"


def test_a_cpu_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    with pytest.raises(
        ConfigError,
        match=r"parallel\.async_tp.*: requires NVIDIA GPUs with symmetric memory over "
        "NVLink, got cpu",
    ):
        build_trainer(tmp_path, *TP2, *ASYNC)


def test_a_gpu_that_cannot_reach_its_group_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    # Two islands of four.
    monkeypatch.setattr(
        torch.cuda, "can_device_access_peer", lambda device, peer: device.index // 4 == peer // 4
    )
    check_async_tp(torch.device("cuda:6"), 4)
    with pytest.raises(
        ValueError, match="8 GPUs of a tensor-parallel group, but cuda:6 cannot access cuda:0"
    ):
        check_async_tp(torch.device("cuda:6"), 8)
