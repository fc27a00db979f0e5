"""The device meshes of a run, from its parallel dimensions."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from titan_lite.config.dims import COPIES, EXPERTS, FSDP, LOSS, SAME_LAYERS, SEQUENCE, ParallelDims


@dataclass(frozen=True)
class Meshes:
    """Views of the ranks, named by use.

    model: the mesh over which parameters are laid out: pp, dp_replicate, fsdp (dp_shard x cp), tp.
    fsdp: its part for FSDP2: (fsdp), or (dp_replicate, fsdp) for HSDP.
    loss: the ranks that have the tokens of the global batch (dp_replicate x dp_shard x cp).
    ep: the ranks that divide the experts among them; None if ep is 1.
    efsdp: like fsdp, for experts: the ranks of dp_shard x cp x tp with the same experts; None if
    that is the same as fsdp.
    cp: the ranks that divide one sequence among them; None if cp is 1.
    pp: the ranks whose stages form one model; None if pp is 1.
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
        # The same ranks; neighbours have different experts.
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
