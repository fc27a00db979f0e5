"""Gathers the shards of each matrix on one rank, its owner, and scatters the updates."""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from titan_lite.runtime.shards import Box, box, own_box


def numel(part: Box) -> int:
    """Returns the number of elements in a box."""
    return math.prod(side.stop - side.start for side in part)


def boxes(parameter: Tensor, rank: int, num_ranks: int) -> list[Box]:
    """Returns the boxes of all ranks; a parameter that is not a DTensor has one rank."""
    if not isinstance(parameter, DTensor):
        assert num_ranks == 1
        return [own_box(parameter)]
    mesh, placements = parameter.device_mesh, parameter.placements
    places = list(itertools.product(*map(range, mesh.shape)))
    assert len(places) == num_ranks, (mesh, num_ranks)
    assert list(places[rank]) == list(mesh.get_coordinate() or ()), (mesh, rank)
    return [box(parameter.shape, mesh.shape, place, placements) for place in places]


def cost(shape: Sequence[int]) -> int:
    """Returns the relative time of Newton-Schulz: m^2 n for sides m <= n."""
    *batch, rows, columns = shape
    return math.prod(batch) * rows * columns * min(rows, columns)


def assign_owners(shapes: Sequence[Sequence[int]], num_ranks: int) -> list[int]:
    """Returns the owner of each matrix: costliest first, each to the least loaded rank."""
    owners, loads = [0] * len(shapes), [0] * num_ranks
    for index in sorted(range(len(shapes)), key=lambda index: -cost(shapes[index])):
        owners[index] = loads.index(min(loads))
        loads[owners[index]] += cost(shapes[index])
    return owners


@dataclass(frozen=True)
class Matrix:
    """A matrix with its owner, and the part of each rank of the group."""

    shape: torch.Size
    owner: int
    boxes: list[Box]

    @cached_property
    def senders(self) -> frozenset[int]:
        """The ranks that send: of replicas of the same part, the first."""
        first: dict[tuple[tuple[int, int], ...], int] = {}
        for rank, part in enumerate(self.boxes):
            first.setdefault(tuple((side.start, side.stop) for side in part), rank)
        return frozenset(first.values())


class Transfer:
    """An all-to-all in progress: sends `pieces` by destination, receives `expected` by source."""

    def __init__(
        self,
        pieces: Sequence[Sequence[Tensor]],
        expected: Sequence[Sequence[int]],
        group: dist.ProcessGroup,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.expected = list(itertools.chain.from_iterable(expected))
        flat = [piece.flatten() for piece in itertools.chain.from_iterable(pieces)]
        self.sent = torch.cat([torch.empty(0, dtype=dtype, device=device), *flat])
        self.received = torch.empty(sum(self.expected), dtype=dtype, device=device)
        self.work = dist.all_to_all_single(
            self.received,
            self.sent,
            [sum(sizes) for sizes in expected],
            [sum(piece.numel() for piece in some) for some in pieces],
            group=group,
            async_op=True,
        )

    def wait(self) -> Sequence[Tensor]:
        """Returns the received tensors, flat, by source."""
        if self.work is not None:
            self.work.wait()
        return self.received.split(self.expected)


class Exchange:
    """Gathers and scatters the matrices of one bucket; collective over `group`."""

    def __init__(
        self,
        matrices: Iterable[Matrix],
        group: dist.ProcessGroup,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.matrices = list(matrices)
        self.group, self.dtype, self.device = group, dtype, device
        self.rank, self.ranks = dist.get_rank(group), range(dist.get_world_size(group))
        self.owned = [matrix for matrix in self.matrices if matrix.owner == self.rank]

    def gather(self, shards: Sequence[Tensor]) -> Transfer:
        """Sends this rank's part of every matrix to its owner."""
        pieces: list[list[Tensor]] = [[] for _ in self.ranks]
        for matrix, shard in zip(self.matrices, shards, strict=True):
            if self.rank in matrix.senders:
                pieces[matrix.owner].append(shard.to(self.device, self.dtype))
        expected = [
            [numel(matrix.boxes[rank]) for matrix in self.owned if rank in matrix.senders]
            for rank in self.ranks
        ]
        return Transfer(pieces, expected, self.group, self.dtype, self.device)

    def assemble(self, transfer: Transfer) -> list[Tensor]:
        """Returns the matrices that this rank owns, whole."""
        wholes = [
            torch.empty(matrix.shape, dtype=self.dtype, device=self.device) for matrix in self.owned
        ]
        arrived = iter(transfer.wait())
        for rank in self.ranks:
            for matrix, whole in zip(self.owned, wholes, strict=True):
                if rank in matrix.senders:
                    part = whole[matrix.boxes[rank]]
                    part.copy_(next(arrived).view_as(part))
        return wholes

    def scatter(self, wholes: Sequence[Tensor]) -> list[Tensor]:
        """Returns this rank's part of every matrix. wholes: the matrices that this rank owns."""
        pieces = [
            [whole[matrix.boxes[rank]] for matrix, whole in zip(self.owned, wholes, strict=True)]
            for rank in self.ranks
        ]
        own = [matrix.boxes[self.rank] for matrix in self.matrices]
        expected: list[list[int]] = [[] for _ in self.ranks]
        for matrix, part in zip(self.matrices, own, strict=True):
            expected[matrix.owner].append(numel(part))
        arrived = iter(Transfer(pieces, expected, self.group, self.dtype, self.device).wait())
        by_owner = sorted(range(len(own)), key=lambda index: self.matrices[index].owner)
        parts = {index: next(arrived) for index in by_owner}
        return [
            parts[index].view([side.stop - side.start for side in part])
            for index, part in enumerate(own)
        ]
