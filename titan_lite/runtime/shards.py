"""Parts of tensors that ranks hold."""

import math
from collections.abc import Sequence

from torch import Tensor
from torch.distributed.tensor import DTensor, Placement

Box = tuple[slice, ...]
"""A part of a tensor: its range in each dim."""


def to_local(tensor: Tensor) -> Tensor:
    """Returns this rank's part of a DTensor, and any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def with_local(tensor: DTensor, local: Tensor) -> DTensor:
    """Returns a DTensor of the same shape and placements around another local tensor."""
    return DTensor.from_local(
        local,
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


def box(
    shape: Sequence[int],
    mesh_shape: Sequence[int],
    place: Sequence[int],
    placements: Sequence[Placement],
) -> Box:
    """Returns the part of a tensor that a rank holds, by its coordinates `place` in the mesh.

    FSDP2's placement is strided where tensor parallel has already split the dim: the axes on its
    right are divided first. torch computes the part with tensors, which have no values in a dry
    run.
    """
    bounds = [(0, size) for size in shape]
    split = [axis for axis, placement in enumerate(placements) if hasattr(placement, "dim")]
    strided = [axis for axis in reversed(split) if hasattr(placements[axis], "split_factor")]
    for axis in [*(axis for axis in split if axis not in strided), *strided]:
        dim = placements[axis].dim  # type: ignore[attr-defined]
        start, end = bounds[dim]
        rows = math.ceil((end - start) / mesh_shape[axis])
        first = min(start + place[axis] * rows, end)
        bounds[dim] = first, min(first + rows, end)
    return tuple(slice(start, end) for start, end in bounds)


def own_box(tensor: Tensor) -> Box:
    """Returns the part of a tensor that this rank holds; all of it if it is not a DTensor."""
    if not isinstance(tensor, DTensor):
        return tuple(slice(0, size) for size in tensor.shape)
    mesh = tensor.device_mesh
    return box(tensor.shape, mesh.shape, mesh.get_coordinate() or (), tensor.placements)
