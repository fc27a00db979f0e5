"""The device meshes of a run, from its parallel dimensions."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from titan_lite.config.dims import COPIES, EXPERTS, FSDP, LOSS, SAME_LAYERS, SEQUENCE, ParallelDims


@dataclass(frozen=True)
class Meshes:
    """Views of the ranks, named by use.

    model: axes pp, dp_replicate, fsdp (dp_shard x cp), tp: what parameters are laid out over.
    fsdp: the part of it that FSDP2 takes: (fsdp), or (dp_replicate, fsdp) for HSDP.
    loss: the ranks whose token sums add up to the global batch's (dp_replicate x dp_shard x cp).
    ep: the ranks that share the experts, None where ep is 1.
    efsdp: as fsdp, for the experts of a rank: of dp_shard x cp x tp, the ranks that have the same
    ones; None where that is fsdp.
    cp: the ranks that hold one sequence together, None where each holds its own.
    pp: the ranks whose stages make one model, None where each has all of it.
    stage: the ranks that have parts of the same parameters.
    """

    model: DeviceMesh
    fsdp: DeviceMesh
    tp: DeviceMesh
    ep: DeviceMesh | None
    efsdp: DeviceMesh | None
    loss: dist.ProcessGroup | None
    cp: dist.ProcessGroup | None
    pp: dist.ProcessGroup | None
    stage: dist.ProcessGroup | None


def build_meshes(dims: ParallelDims, device_type: str, *, has_experts: bool = False) -> Meshes:
    """Builds the meshes; collective."""

    def group(name: str, axes: Sequence[str]) -> dist.ProcessGroup:
        """Creates the group of ranks that differ only on `axes`, which must be adjacent."""
        first = dims.AXES.index(axes[0])
        end = first + len(axes)
        assert dims.AXES[first:end] == tuple(axes)
        return init_device_mesh(
            device_type,
            (dims.over(dims.AXES[:first]), dims.over(axes), dims.over(dims.AXES[end:])),
            mesh_dim_names=("before", name, "after"),
        ).get_group(name)

    names = tuple(dict.fromkeys("fsdp" if axis in FSDP else axis for axis in dims.AXES))
    degrees = tuple(getattr(dims, name) for name in names)
    model = init_device_mesh(device_type, degrees, mesh_dim_names=names)
    copies = [name for name in COPIES if getattr(dims, name) > 1]
    ep = efsdp = None
    if has_experts and dims.ep * dims.tp > 1:
        # The same ranks, of which neighbours have different experts.
        at = names.index("fsdp")
        assert names[at:] == ("fsdp", "tp")
        experts = init_device_mesh(
            device_type,
            (*degrees[:at], dims.over(EXPERTS) // dims.ep, dims.ep),
            mesh_dim_names=(*names[:at], "efsdp", "ep"),
        )
        ep = experts["ep"] if dims.ep > 1 else None
        efsdp = experts[(*copies, "efsdp")]
    return Meshes(
        model=model,
        fsdp=model[(*copies, "fsdp")],
        tp=model["tp"],
        ep=ep,
        efsdp=efsdp,
        loss=dist.group.WORLD if dims.loss == dims.world_size else group("loss", LOSS),
        cp=group("cp", SEQUENCE) if dims.cp > 1 else None,
        pp=model.get_group("pp") if dims.pp > 1 else None,
        stage=group("stage", SAME_LAYERS) if dims.pp > 1 else dist.group.WORLD,
    )
