"""Groups of the meshes: which ranks are in them."""

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

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


def _place(dims: ParallelDims, rank: int) -> list[tuple[str, int]]:
    return list(dims.coordinates(rank).items())
