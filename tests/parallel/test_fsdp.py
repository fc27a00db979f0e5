"""Arguments of FSDP2: meshes, resharding, precision, offload, and when gradients are reduced."""

import contextlib
import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from tests.distributed import Workers
from tests.runs import build_trainer, read_metrics, train
from titan_lite.config.dims import ParallelDims
from titan_lite.config.schema import Parallel
from titan_lite.parallel.mesh import build_meshes

ALWAYS = ["--parallel.reshard_after_forward=always"]


def _groups() -> dict[str, Any]:
    dims = ParallelDims.resolve(Parallel(dp_replicate=2), dist.get_world_size())
    mesh = build_meshes(dims, "cpu").fsdp
    return {
        axis: dist.get_process_group_ranks(mesh.get_group(axis)) for axis in mesh.mesh_dim_names
    }


@pytest.mark.distributed
def test_hsdp_shards_over_neighbours_and_replicates_over_the_rest(
    workers: dict[int, Workers],
) -> None:
    assert workers[4].run(_groups) == [
        {"dp_replicate": [0, 2], "fsdp": [0, 1]},
        {"dp_replicate": [1, 3], "fsdp": [0, 1]},
        {"dp_replicate": [0, 2], "fsdp": [2, 3]},
        {"dp_replicate": [1, 3], "fsdp": [2, 3]},
    ]


def _gathered_after_forward(folder: Path, choice: str) -> dict[str, bool]:
    """Which units still hold whole weights between forward and backward."""
    trainer = build_trainer(
        folder, f"--parallel.reshard_after_forward={choice}", "--training.local_batch_size=2"
    )
    model = trainer.built.model
    rows = {name: p.shape[0] for name, p in model.named_parameters()}
    model(next(trainer.data.batches).inputs).sum()
    whole = {
        name: p.shape[0] for name, p in model.named_parameters() if type(p).__name__ != "DTensor"
    }
    trainer.close()
    units = ("tok_embeddings", "layers.0", "layers.1", "norm", "output")
    assert all(rows[name] == whole[name] for name in whole)
    return {unit: any(name.startswith(unit) for name in whole) for unit in units}


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("choice", "gathered"),
    [
        ("always", set()),
        ("last_block_kept", {"layers.1", "norm", "output"}),
        ("default", {"layers.1", "norm", "output"}),
        ("never", {"tok_embeddings", "layers.0", "layers.1", "norm", "output"}),
    ],
)
def test_resharding_frees_the_units_it_names(
    workers: dict[int, Workers], tmp_path: Path, choice: str, gathered: set[str]
) -> None:
    for units in workers[4].run(_gathered_after_forward, tmp_path, choice):
        assert {unit for unit, is_whole in units.items() if is_whole} == gathered


def _is_whole_at_start(folder: Path, *overrides: str) -> list[bool]:
    """Returns whether the first local block is whole as each micro-batch of a step reaches it."""
    trainer = build_trainer(folder, *overrides)
    block = next(iter(trainer.built.model.layers.children()))
    wholes: list[bool] = []

    def note(block: torch.nn.Module, _: Any) -> None:
        wholes.append(not isinstance(next(block.parameters()), DTensor))

    # Before FSDP2's own hook.
    block.register_forward_pre_hook(note, prepend=True)
    trainer.train_step(1)
    assert all(isinstance(parameter, DTensor) for parameter in trainer.built.model.parameters())
    trainer.close()
    return wholes


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("num_processes", "overrides", "wholes"),
    [
        (2, ["--training.local_batch_size=2"], [False, False]),
        (1, ["--training.local_batch_size=4"], [False, True]),
        (1, ["--training.local_batch_size=4", *ALWAYS], [False, False]),
        (4, ["--training.local_batch_size=2", "--parallel.pp=2"], [False, True]),
        (4, ["--training.local_batch_size=2", "--parallel.pp=2", *ALWAYS], [False, False]),
    ],
)
def test_by_default_weights_stay_gathered_at_degree_1_and_in_pipelines(
    workers: dict[int, Workers],
    tmp_path: Path,
    num_processes: int,
    overrides: list[str],
    wholes: list[bool],
) -> None:
    # Only the first rank: in a pipeline's last stage, backward follows forward at once, after which
    # torch's schedules free nothing before the last micro-batch.
    assert workers[num_processes].run(_is_whole_at_start, tmp_path, *overrides)[0] == wholes


def _divided_units(folder: Path) -> list[list[int]]:
    """Shapes of what a step divides of FSDP2's buffers: all gradients of a unit in one row."""
    trainer = build_trainer(folder)
    with torch.profiler.profile(record_shapes=True) as profiler:
        trainer.train_step(1)
    trainer.close()
    shapes = [e.input_shapes[0] for e in profiler.events() if e.name.startswith("aten::div")]
    return [shape for shape in shapes if len(shape) == 1 and shape[0] > 10_000]


@pytest.mark.distributed
def test_no_gradient_is_divided_at_degree_1(one_process: Workers, tmp_path: Path) -> None:
    assert one_process.run(_divided_units, tmp_path) == [[]]


def _policies(folder: Path, *overrides: str) -> tuple[set[str], set[str], set[int]]:
    trainer = build_trainer(folder, "--training.local_batch_size=2", *overrides)
    states = [
        module._get_fsdp_state()
        for module in trainer.built.model.modules()
        if isinstance(module, FSDPModule)
    ]
    groups = []
    for state in states:
        # torch 2.11 has one group per unit, or None in a unit without its own parameters.
        if hasattr(state, "_fsdp_param_groups"):
            groups += state._fsdp_param_groups
        elif state._fsdp_param_group is not None:
            groups.append(state._fsdp_param_group)
    trainer.close()
    offload = {type(group.offload_policy).__name__ for group in groups}
    policies = [state._mp_policy for state in states]
    dtypes = {f"{policy.param_dtype} {policy.reduce_dtype}" for policy in policies}
    meshes = {
        group.post_forward_mesh_info.shard_mesh_size
        for group in groups
        if group.post_forward_mesh_info is not None
    }
    return offload, dtypes, meshes


@pytest.mark.distributed
def test_precision_offload_and_integer_resharding_reach_every_unit(
    workers: dict[int, Workers], tmp_path: Path
) -> None:
    offload, dtypes, _ = workers[4].run(
        _policies,
        tmp_path,
        "--parallel.cpu_offload=true",
        "--training.param_dtype=bfloat16",
        "--training.reduce_dtype=bfloat16",
    )[0]
    assert offload == {"CPUOffloadPolicy"}
    assert dtypes == {"torch.bfloat16 torch.bfloat16"}
    offload, dtypes, sizes = workers[4].run(
        _policies, tmp_path, "--parallel.reshard_after_forward=2"
    )[0]
    assert offload == {"OffloadPolicy"}
    assert dtypes == {"torch.float32 torch.float32"}
    assert sizes == {2}


def _dtypes(folder: Path, *overrides: str) -> tuple[list[dict[str, Any]], dict[str, torch.dtype]]:
    """Records, and the types of the tensors that enter and leave modules."""
    trainer = build_trainer(folder, "--training.param_dtype=bfloat16", *overrides)
    actual = {}
    block = trainer.built.model.get_submodule("layers.1")
    block.register_forward_pre_hook(lambda _, inputs: actual.update(residual=inputs[0].dtype))
    block.get_submodule("attention").register_forward_hook(
        lambda _module, inputs, output: actual.update(attention=inputs[0].dtype, sum=output.dtype)
    )
    trainer.built.model.get_submodule("output").register_forward_pre_hook(
        lambda _, inputs: actual.update(head=inputs[0].dtype)
    )
    trainer.train()
    trainer.close()
    return read_metrics(folder), actual


@pytest.mark.distributed
@pytest.mark.slow
def test_a_float32_residual_stream_leaves_blocks_in_bfloat16(
    workers: dict[int, Workers], tmp_path: Path
) -> None:
    half = torch.bfloat16
    plain, dtypes = workers[1].run(_dtypes, tmp_path / "plain")[0]
    assert dtypes == {"residual": half, "attention": half, "sum": half, "head": half}
    flag = "--model.fp32_residual=true"
    wide, dtypes = workers[1].run(_dtypes, tmp_path / "wide", flag)[0]
    assert dtypes == {"residual": torch.float32, "attention": half, "sum": half, "head": half}
    split, dtypes = workers[2].run(_dtypes, tmp_path / "tp", flag, "--parallel.tp=2")[0]
    assert dtypes["residual"] == torch.float32
    full = workers[1].run(train, tmp_path / "float32")[0]

    def distance(records: list[dict[str, Any]]) -> float:
        return max(abs(a["loss"] - b["loss"]) for a, b in zip(records, full, strict=True))

    assert 0 < distance(wide) < distance(plain)
    assert [r["loss"] for r in split] == pytest.approx([r["loss"] for r in wide], rel=1e-4)


def _collectives(folder: Path) -> tuple[list[str], int]:
    """All-gathers of one optimizer step with 2 micro-batches by unit, and its large all-reduces."""
    trainer = build_trainer(folder, "--training.local_batch_size=1", "--parallel.dp_replicate=2")
    count, all_reduce = 0, dist.all_reduce

    def counting(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal count
        # Small ones carry token counts, norms and metrics.
        count += tensor.numel() > 10
        return all_reduce(tensor, *args, **kwargs)

    dist.all_reduce = counting
    try:
        with torch.profiler.profile() as profiler:
            trainer.train_step(1)
    finally:
        dist.all_reduce = all_reduce
    trainer.close()
    gathers = [e.name for e in profiler.events() if e.name.startswith("FSDP::all_gather (")]
    return sorted(gathers), count


@pytest.mark.distributed
def test_replicas_add_up_gradients_once_per_step_and_embeddings_are_gathered_once(
    workers: dict[int, Workers], tmp_path: Path
) -> None:
    for gathers, all_reduces in workers[4].run(_collectives, tmp_path):
        # 4 units: the embedding, 2 blocks, norm and head together.
        assert all_reduces == 4
        # In each micro-batch the first block again in backward: the second is kept.
        expected = ["layers.0"] * 2 + ["layers.1", "norm, output", "tok_embeddings"]
        assert gathers == sorted(f"FSDP::all_gather ({unit})" for unit in expected * 2)


STEPS = ("--training.steps=2", "--training.local_batch_size=4")


class SymmetricMemory:
    """Stands in for torch's, which needs CUDA: plain tensors, and sizes of those registered."""

    def __init__(self) -> None:
        self.backends: set[str] = set()
        self.registered: list[int] = []

    def set_backend(self, name: str) -> None:
        self.backends.add(name)

    def get_mem_pool(self, _device: torch.device) -> None:
        pass

    def rendezvous(self, tensor: torch.Tensor, group: str) -> None:
        self.registered.append(tensor.numel())


def _from_symmetric_memory(folder: Path) -> tuple[list[dict[str, Any]], SymmetricMemory, str]:
    memory = SymmetricMemory()
    with (
        mock.patch("torch.distributed.fsdp._fully_shard._fsdp_collectives.symm_mem", memory),
        mock.patch("torch.cuda.use_mem_pool", contextlib.nullcontext),
        # torch 2.15 calls that of the device's module.
        mock.patch("torch.cpu.use_mem_pool", contextlib.nullcontext, create=True),
        mock.patch("titan_lite.training.meta_model.check_symm_mem"),
    ):
        records = train(folder, *STEPS, "--parallel.fsdp_symm_mem=true")
    applied = json.loads((folder / "run.json").read_text())["applied"]
    return records, memory, applied["symm_mem"]


@pytest.mark.distributed
@pytest.mark.skipif(
    not hasattr(FSDPModule, "set_symm_mem_for_comm"), reason="torch has no symmetric memory in FSDP"
)
def test_gathers_and_reductions_are_from_symmetric_memory(
    workers: dict[int, Workers], tmp_path: Path
) -> None:
    expected = workers[2].run(train, tmp_path / "plain", *STEPS)[0]
    records, memory, is_reported = workers[2].run(_from_symmetric_memory, tmp_path / "symm")[0]
    assert is_reported
    assert memory.backends == {"NCCL"}
    # Each step registers, for embeddings, 2 blocks and head, a gathered unit, and input and output
    # of a reduction.
    assert len(memory.registered) >= 2 * 4 * 3
    for key in ("loss", "grad_norm"):
        assert [r[key] for r in records] == [r[key] for r in expected]
