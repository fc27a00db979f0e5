"""ParallelDims: degrees multiply to the world, and ranks have one place each."""

import dataclasses
import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from titan_lite.config.dims import ParallelDims
from titan_lite.config.schema import Parallel

degree = st.integers(1, 4)
dims_of_any_world = st.builds(
    ParallelDims, pp=degree, dp_replicate=degree, dp_shard=degree, cp=degree, tp=degree
)
parallels = st.builds(
    Parallel, pp=degree, dp_replicate=degree, dp_shard=degree | st.just(-1), cp=degree, tp=degree
)


@given(parallels, st.integers(1, 300))
def test_the_degrees_multiply_to_the_world_or_raise(parallel: Parallel, world_size: int) -> None:
    fixed = math.prod(max(1, getattr(parallel, axis)) for axis in ParallelDims.AXES)
    fits = world_size % fixed == 0 if parallel.dp_shard == -1 else world_size == fixed
    if not fits:
        with pytest.raises(ValueError, match=rf"world size .*\b{world_size}\b"):
            ParallelDims.resolve(parallel, world_size)
        return
    dims = ParallelDims.resolve(parallel, world_size)
    assert dims.world_size == world_size
    assert parallel.dp_shard in (-1, dims.dp_shard)


@given(dims_of_any_world)
def test_a_rank_has_one_place_and_a_place_one_rank(dims: ParallelDims) -> None:
    places = [dims.coordinates(rank) for rank in range(dims.world_size)]
    assert [dims.rank(place) for place in places] == list(range(dims.world_size))
    assert places == sorted(places, key=lambda place: tuple(place.values()))
    assert tuple(places[0]) == ParallelDims.AXES


@given(dims_of_any_world, st.sampled_from(ParallelDims.AXES))
def test_each_rank_is_in_one_group_per_axis_of_the_size_of_its_degree(
    dims: ParallelDims, axis: str
) -> None:
    groups = Counter(
        tuple(place for name, place in dims.coordinates(rank).items() if name != axis)
        for rank in range(dims.world_size)
    )
    assert set(groups.values()) == {getattr(dims, axis)}


@given(dims_of_any_world)
def test_each_share_of_the_batch_has_as_many_ranks(dims: ParallelDims) -> None:
    shares = Counter(dims.batch_rank(rank) for rank in range(dims.world_size))
    assert sorted(shares) == list(range(dims.batch))
    assert set(shares.values()) == {dims.pp * dims.cp * dims.tp}


def test_the_views_are_products_of_their_axes() -> None:
    dims = ParallelDims(pp=2, dp_replicate=3, dp_shard=5, cp=7, tp=11)
    assert (dims.world_size, dims.batch, dims.fsdp, dims.loss) == (2310, 15, 35, 105)


def test_tp_is_the_fastest_axis_and_pp_the_slowest() -> None:
    dims = ParallelDims(pp=2, dp_replicate=1, dp_shard=2, cp=1, tp=2)
    assert dims.coordinates(1)["tp"] == 1
    assert dims.coordinates(2)["dp_shard"] == 1
    assert dims.coordinates(4)["pp"] == 1
    with pytest.raises(AssertionError, match="rank 8 of 8"):
        dims.coordinates(8)


def test_a_wrong_world_size_is_told_with_the_numbers() -> None:
    with pytest.raises(ValueError, match=r"multiply to the world size \(7\), got pp \(1"):
        ParallelDims.resolve(Parallel(dp_replicate=2, dp_shard=4), 7)
    with pytest.raises(ValueError, match=r"world size \(6\) must be .* dp_replicate \(4\).* = 4;"):
        ParallelDims.resolve(Parallel(dp_replicate=4), 6)
    with pytest.raises(ValueError, match="= 1; lower a degree, or use a multiple of 1 proc"):
        ParallelDims.resolve(Parallel(), 0)


def test_the_smallest_world_has_ranks_to_share_the_experts() -> None:
    assert ParallelDims.smallest_world(Parallel(ep=4)) == 4
    assert ParallelDims.smallest_world(Parallel(ep=4, cp=2, pp=2)) == 8
    assert ParallelDims.smallest_world(Parallel(ep=2, dp_shard=8)) == 8
    assert ParallelDims.smallest_world(Parallel(ep=2, tp=2)) == 2
    assert ParallelDims.smallest_world(Parallel(ep=8, tp=4)) == 8


def test_each_row_of_the_mesh_is_a_degree_and_a_key() -> None:
    # ep is not a separate axis: its ranks are some of those that FSDP2 shards over.
    fields = [field.name for field in dataclasses.fields(ParallelDims)]
    assert fields == [*ParallelDims.AXES, "ep"]
    assert set(ParallelDims.AXES) <= Parallel.model_fields.keys()


@given(dims_of_any_world)
def test_views_are_products_of_their_axes(dims: ParallelDims) -> None:
    assert dims.batch == dims.dp_replicate * dims.dp_shard
    assert dims.fsdp == dims.dp_shard * dims.cp
    assert dims.loss == dims.dp_replicate * dims.dp_shard * dims.cp
