"""Groups of the meshes: which ranks are in them."""

from pathlib import Path

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.distributed import Workers
from tests.runs import train
from titan_lite.config.dims import ParallelDims
from titan_lite.parallel.mesh import build_meshes


@pytest.mark.parametrize("degrees", [(2, 2, 1, 2, 2), (1, 2, 2, 1, 1), (1, 1, 2, 2, 2)])
def test_a_group_has_the_ranks_that_differ_on_its_axes_only(degrees: tuple[int, ...]) -> None:
    dims = ParallelDims(**dict(zip(ParallelDims.AXES, degrees, strict=True)))
    rank = dims.world_size - 2
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=dims.world_size)
    try:
        meshes = build_meshes(dims, "cpu")
        groups = [
            ({"pp"}, meshes.pp),
            ({"cp"}, meshes.cp),
            ({"tp"}, meshes.tp.get_group()),
            ({"dp_replicate", "dp_shard", "cp"}, meshes.loss),
            ({"dp_replicate", "dp_shard", "cp", "tp"}, meshes.stage),
        ]
        for axes, group in groups:
            own = dims.coordinates(rank)
            expected = [
                other
                for other in range(dims.world_size)
                if all(own[axis] == at for axis, at in _place(dims, other) if axis not in axes)
            ]
            members = [rank] if group is None else dist.get_process_group_ranks(group)
            assert members == expected, axes
    finally:
        dist.destroy_process_group()


def test_neighbours_share_experts_that_the_other_ranks_of_a_replica_shard() -> None:
    dims = ParallelDims(pp=2, dp_replicate=2, dp_shard=2, cp=1, tp=2, ep=2)
    dist.init_process_group("fake", store=FakeStore(), rank=5, world_size=dims.world_size)
    try:
        meshes = build_meshes(dims, "cpu", has_experts=True)
        assert meshes.ep is not None
        assert meshes.efsdp is not None
        assert dist.get_process_group_ranks(meshes.ep.get_group()) == [4, 5]
        assert dist.get_process_group_ranks(meshes.efsdp.get_group("efsdp")) == [5, 7]
        assert build_meshes(dims, "cpu").efsdp is None
    finally:
        dist.destroy_process_group()


def _place(dims: ParallelDims, rank: int) -> list[tuple[str, int]]:
    return list(dims.coordinates(rank).items())


@pytest.mark.slow
@pytest.mark.distributed
def test_meshes_built_for_one_run_train_what_shared_ones_do(
    workers: dict[int, Workers], tmp_path: Path
) -> None:
    """Other tests of several processes share meshes and gloo's device between their runs."""
    with Workers(4, tmp_path, shares=False) as own:
        for axes in (("tp", "pp"), ("cp", "dp_replicate")):
            settings = [f"--parallel.{axis}=2" for axis in axes]
            settings += ["--training.steps=2", "--training.local_batch_size=4"]
            shared, built = (
                group.run(train, tmp_path / f"{axes[0]} {name}", *settings)[0]
                for name, group in (("shared", workers[4]), ("built", own))
            )
            for key in ("loss", "grad_norm"):
                assert [record[key] for record in built] == [record[key] for record in shared]
