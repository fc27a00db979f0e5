"""The device meshes of a run, from its parallel dimensions."""

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from titan_lite.config.dims import ParallelDims


@dataclass(frozen=True)
class Meshes:
    """Views of the ranks, named by use.

    model: axes pp, dp_replicate, fsdp (dp_shard x cp), tp: what parameters are laid out over.
    fsdp: the part of it that FSDP2 takes: (fsdp), or (dp_replicate, fsdp) for HSDP.
    loss: the ranks whose token sums add up to the global batch's (dp_replicate x dp_shard x cp).
    cp: the ranks that hold one sequence together, None where each holds its own.
    pp: the ranks whose stages make one model, None where each has all of it.
    stage: the ranks that have parts of the same parameters.
    """

    model: DeviceMesh
    fsdp: DeviceMesh
    tp: DeviceMesh
    loss: dist.ProcessGroup | None
    cp: dist.ProcessGroup | None
    pp: dist.ProcessGroup | None
    stage: dist.ProcessGroup | None


def build_meshes(dims: ParallelDims, device_type: str) -> Meshes:
    """Builds the meshes; collective. Merged axes are neighbours in `ParallelDims.AXES`."""
    model = init_device_mesh(
        device_type,
        (dims.pp, dims.dp_replicate, dims.fsdp, dims.tp),
        mesh_dim_names=("pp", "dp_replicate", "fsdp", "tp"),
    )
    fsdp = model["dp_replicate", "fsdp"] if dims.dp_replicate > 1 else model["fsdp"]
    if dims.pp * dims.tp == 1:
        loss = dist.group.WORLD
    else:
        loss = init_device_mesh(
            device_type, (dims.pp, dims.loss, dims.tp), mesh_dim_names=("pp", "loss", "tp")
        ).get_group("loss")
    cp = None
    if dims.cp > 1:
        cp = init_device_mesh(
            device_type,
            (dims.pp * dims.batch, dims.cp, dims.tp),
            mesh_dim_names=("pp_batch", "cp", "tp"),
        ).get_group("cp")
    pp, stage = None, dist.group.WORLD
    if dims.pp > 1:
        pp = model.get_group("pp")
        stage = init_device_mesh(
            device_type, (dims.pp, dims.world_size // dims.pp), mesh_dim_names=("pp", "stage")
        ).get_group("stage")
    return Meshes(model=model, fsdp=fsdp, tp=model["tp"], loss=loss, cp=cp, pp=pp, stage=stage)
