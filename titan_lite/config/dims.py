"""The degrees of the device mesh, each rank's coordinates, and the groups of ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

from titan_lite.config.problems import SettingError
from titan_lite.config.schema import Parallel


def resolve_global_batch(size: int, local_batch_size: int, batch_degree: int) -> int:
    """Samples per optimizer step; -1 is one micro-batch on each data-parallel rank."""
    return local_batch_size * batch_degree if size == -1 else size


def _start(number: str) -> str:
    """Returns the advice to change the number of processes."""
    return f"use {number} processes (run_train.sh: NGPU x NNODES; other commands: --world-size)"


@dataclass(frozen=True)
class Axis:
    """A mesh axis, and how its ranks divide parameters, samples and sequences."""

    name: str
    parameters: Literal["stages", "copies", "shards", "split"]
    """Each rank has the parameters of different layers ("stages"), all parameters ("copies"), a
    part of each, which FSDP2 gathers ("shards"), or a part with which it computes ("split")."""
    splits_samples: bool = False
    """Ranks read different samples."""
    splits_sequence: bool = False
    """Ranks have different tokens of a sample."""


MESH = (
    Axis("pp", "stages"),
    Axis("dp_replicate", "copies", splits_samples=True),
    Axis("dp_shard", "shards", splits_samples=True),
    Axis("cp", "shards", splits_sequence=True),
    Axis("tp", "split"),
)
"""The axes in order. Ranks are numbered row-major: those of the last axis are consecutive."""
BATCH = tuple(axis.name for axis in MESH if axis.splits_samples)
SEQUENCE = tuple(axis.name for axis in MESH if axis.splits_sequence)
LOSS = tuple(axis.name for axis in MESH if axis.splits_samples or axis.splits_sequence)
SAME_LAYERS = tuple(axis.name for axis in MESH if axis.parameters != "stages")
COPIES = tuple(axis.name for axis in MESH if axis.parameters == "copies")
FSDP = tuple(axis.name for axis in MESH if axis.parameters == "shards")
EXPERTS = tuple(axis.name for axis in MESH if axis.parameters in ("shards", "split"))


@dataclass(frozen=True, kw_only=True)
class ParallelDims:
    """Degree of each mesh axis."""

    AXES: ClassVar[tuple[str, ...]] = tuple(axis.name for axis in MESH)

    pp: int
    dp_replicate: int
    dp_shard: int
    cp: int
    tp: int
    ep: int = 1
    """Consecutive ranks in dp_shard x cp x tp that divide the experts among them."""

    @classmethod
    def resolve(cls, parallel: Parallel, world_size: int) -> ParallelDims:
        """Returns the degrees for a world size; `dp_shard = -1` becomes its quotient by the others.

        Raises SettingError, with the numbers, if the degrees do not multiply to the world size.
        """
        degrees = {axis: getattr(parallel, axis) for axis in cls.AXES}
        keys = ("parallel.dp_shard", *(f"parallel.{axis}" for axis in cls.AXES))
        given = {axis: degree for axis, degree in degrees.items() if degree != -1}
        product = math.prod(given.values())
        factors = " x ".join(f"{axis} ({degree})" for axis, degree in given.items())
        if len(given) == len(degrees) and product != world_size:
            raise SettingError(
                keys,
                f"the degrees must multiply to the world size ({world_size}), got {factors} = "
                f"{product}; set parallel.dp_shard = -1, or {_start(str(product))}",
            )
        if world_size < 1 or world_size % product:
            raise SettingError(
                keys,
                f"with dp_shard = -1, the world size ({world_size}) must be a positive multiple of "
                f"{factors} = {product}; lower a degree, or {_start(f'a multiple of {product}')}",
            )
        dims = cls(**{"dp_shard": world_size // product, **given}, ep=parallel.ep)
        if dims.over(EXPERTS) % dims.ep:
            factors = " x ".join(f"{axis} ({getattr(dims, axis)})" for axis in EXPERTS)
            raise SettingError(
                ("parallel.ep", *(f"parallel.{axis}" for axis in EXPERTS)),
                f"parallel.ep ({dims.ep}) must divide {factors} = {dims.over(EXPERTS)}, the number "
                "of ranks over which experts can be distributed",
            )
        return dims

    @classmethod
    def smallest_world(cls, parallel: Parallel) -> int:
        """The smallest number of ranks that the degrees allow."""
        axes = {axis: max(1, getattr(parallel, axis)) for axis in cls.AXES}
        if parallel.dp_shard == -1:
            axes["dp_shard"] = parallel.ep // math.gcd(parallel.ep, parallel.cp * parallel.tp)
        return math.prod(axes.values())

    @cached_property
    def world_size(self) -> int:
        """Number of ranks."""
        return math.prod(getattr(self, axis) for axis in self.AXES)

    @property
    def at_world_size(self) -> str:
        """Words that follow a degree in a message, because the world size may be a default."""
        return f"at world size {self.world_size} (to change it: --world-size, or NGPU x NNODES)"

    def over(self, axes: Iterable[str]) -> int:
        """Number of ranks that differ only in their coordinates on these axes."""
        return math.prod(getattr(self, axis) for axis in axes)

    @cached_property
    def batch(self) -> int:
        """Number of ranks, or groups of ranks, that read different samples."""
        return self.over(BATCH)

    @cached_property
    def fsdp(self) -> int:
        """Number of ranks over which FSDP2 shards each parameter."""
        return self.over(FSDP)

    @property
    def loss(self) -> int:
        """Number of ranks over which token losses are summed."""
        return self.over(LOSS)

    def coordinates(self, rank: int) -> dict[str, int]:
        """Coordinate of a rank on each axis."""
        assert 0 <= rank < self.world_size, f"rank {rank} of {self.world_size}"
        place = {}
        for axis in reversed(self.AXES):
            rank, place[axis] = divmod(rank, getattr(self, axis))
        return {axis: place[axis] for axis in self.AXES}

    def rank(self, coordinates: Mapping[str, int], axes: Iterable[str] = AXES) -> int:
        """The number of these coordinates on some axes; on all, the inverse of `coordinates`."""
        rank = 0
        for axis in axes:
            rank = rank * getattr(self, axis) + coordinates[axis]
        return rank

    def batch_rank(self, rank: int) -> int:
        """Number of the share of samples that a rank reads, from 0 to batch - 1."""
        return self.rank(self.coordinates(rank), BATCH)
