"""FSDP2 and HSDP: one unit per block, one for the embeddings, one for the norm and each head."""

import warnings
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import Shard

from titan_lite.config.schema import Parallel
from titan_lite.nn.moe import Experts
from titan_lite.nn.transformer import Transformer
from titan_lite.parallel.mesh import Meshes
from titan_lite.runtime.shards import to_local

Modules = list[nn.Module]


def _fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def check_symm_mem(device: torch.device) -> None:
    """Raises ValueError if FSDP2 cannot communicate from symmetric memory."""
    remedy = "set parallel.fsdp_symm_mem = false"
    if not hasattr(FSDPModule, "set_symm_mem_for_comm"):
        raise ValueError(f"requires torch 2.13 or later, got {torch.__version__}; {remedy}")
    if device.type != "cuda":
        raise ValueError(f"requires CUDA devices, got {device.type}; {remedy}")


def uses_symm_mem(model: nn.Module) -> bool:
    """Returns True if FSDP2 gathers all parameters from symmetric memory."""
    gathers = [
        type(group._all_gather_comm).__name__
        for module in _fsdp_modules(model)
        for group in getattr(module._get_fsdp_state(), "_fsdp_param_groups", ())
    ]
    return bool(gathers) and all(name == "SymmMemAllGather" for name in gathers)


def set_gradient_sync(model: Transformer, meshes: Meshes, section: Parallel, *, last: bool) -> None:
    """Sets what the next backward reduces and frees. last: the last micro-batch of its step."""
    assert isinstance(model, FSDPModule)
    # Replicas are reduced once per step; before, gradients are only reduced within each replica.
    model.set_requires_all_reduce(last)
    syncs_once = section.gradient_sync == "last_micro_batch"
    if syncs_once:
        model.set_requires_gradient_sync(last)
    # At degree 1 there is nothing to reduce, and each gather would cast and copy all weights.
    degree = max(mesh.shape[-1] for mesh in (meshes.fsdp, meshes.efsdp) if mesh is not None)
    if _reshard(section, degree) == "never" and (syncs_once or degree == 1):
        model.set_reshard_after_backward(last)


def _reshard(section: Parallel, degree: int) -> str | int:
    """Returns parallel.reshard_after_forward for an FSDP degree, with its default resolved."""
    if section.reshard_after_forward != "default":
        return section.reshard_after_forward
    return "never" if section.pp > 1 or degree == 1 else "last_block_kept"


def free_gathered(model: nn.Module) -> None:
    """Frees parameters that are still gathered after a forward without backward."""
    for module in _fsdp_modules(model):
        module.reshard()


def precision(model: nn.Module) -> str:
    """Returns the dtypes of FSDP2's units for compute and reduction."""
    policies = {
        f"{policy.param_dtype} computation, {policy.reduce_dtype} reduction"
        for module in _fsdp_modules(model)
        for policy in (module._get_fsdp_state()._mp_policy,)
    }
    return " and ".join(sorted(policies)).replace("torch.", "")


def apply_fsdp(
    model: Transformer,
    mesh: DeviceMesh,
    section: Parallel,
    *,
    param_dtype: torch.dtype,
    reduce_dtype: torch.dtype,
    expert_mesh: DeviceMesh | None = None,
    compiles_blocks: bool = False,
) -> None:
    """Shards the model in place over `mesh`: 1D (fsdp), or 2D (dp_replicate, fsdp) for HSDP.

    Experts are separate units over `expert_mesh`, if it is given.
    It is also applied at degree 1, so that one device computes in the same precision as many.
    """
    offload: OffloadPolicy = OffloadPolicy()
    if section.cpu_offload:
        offload = CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu")
    policy = MixedPrecisionPolicy(
        param_dtype=param_dtype,
        reduce_dtype=reduce_dtype,
        # A float32 residual stream must not be cast at each block.
        cast_forward_inputs=not model.fp32_residual,
    )
    if model.fp32_residual and model.tok_embeddings is not None:
        model.tok_embeddings.register_forward_hook(lambda _module, _inputs, output: output.float())
    shard = partial(_shard, mp_policy=policy, offload_policy=offload)
    embeddings, head, separate = _end_units(model)
    frees_always = _reshard(section, mesh.shape[-1]) == "always"
    if embeddings:
        shard(embeddings, mesh, _reshard_block(section, mesh))
    blocks = list(model.layers.children())
    for block in blocks:
        is_last = block is blocks[-1]
        for module in block.modules():
            if expert_mesh is not None and isinstance(module, Experts):
                shard([module], expert_mesh, _reshard_block(section, expert_mesh, is_last=is_last))
                if compiles_blocks:
                    _move_hooks(module, block)
        shard([block], mesh, _reshard_block(section, mesh, is_last=is_last))
    if head:
        shard(head, mesh, frees_always)
    for module in (*separate, model):
        shard([module], mesh, frees_always)
    # Under tensor parallel, a unit that ends with a norm returns a view. That is safe, because no
    # model here changes it in place.
    units = "PostNormBlock|LayerNorm"
    warnings.filterwarnings("ignore", rf"FSDP2-wrapped module \(FSDP({units})\) returned a view")
    if section.fsdp_symm_mem and mesh.shape[-1] > 1:
        # After the reduction is set to SUM, the only one that symmetric memory supports.
        for unit in _fsdp_modules(model):
            unit.set_symm_mem_for_comm()
    if all(isinstance(module, nn.Embedding) for module in embeddings):
        for module in embeddings:
            # The gradient of an embedding lookup does not need the table.
            assert isinstance(module, FSDPModule)
            module.set_unshard_in_backward(False)


def _end_units(model: Transformer) -> tuple[Modules, Modules, Modules]:
    """Returns the embeddings and the head, one unit each, and modules that are separate units."""
    ends = {name: model.get_submodule(name) for name in model.ends}
    embeddings = [ends[name] for name in ends if name in model.first]
    # Not in the head's unit: FSDP2 frees a unit when every module of it has run; a forward may
    # leave these out.
    separate = [ends[name] for name in ends if name in model.per_sample]
    head = [module for module in ends.values() if module not in (*embeddings, *separate)]
    if model.tied_head and embeddings and model.output is not None:
        # A tied weight can be in one unit only.
        return [], [*embeddings, *head], separate
    return embeddings, head, separate


def _reshard_block(section: Parallel, mesh: DeviceMesh, *, is_last: bool = False) -> bool | int:
    """Returns fully_shard's reshard_after_forward for a block or its experts."""
    choice = _reshard(section, mesh.shape[-1])
    if choice == "last_block_kept":
        # Backward starts with the last block: if it were freed, it would be gathered at once.
        return not is_last
    return choice if isinstance(choice, int) else choice != "never"


def _shard(
    modules: Modules, mesh: DeviceMesh, reshard_after_forward: bool | int, **policies: Any
) -> None:
    """Makes the modules one unit.

    Gradients are summed over the ranks, not averaged, because the loss is already divided by the
    tokens of the global batch. At degree 1 no factor is set, because FSDP2 would divide by it.
    """
    fully_shard(
        modules,
        mesh=mesh,
        reshard_after_forward=reshard_after_forward,
        shard_placement_fn=partial(_placement, mesh.shape[-1]),
        **policies,
    )
    if mesh.size() > 1:
        for module in modules:
            assert isinstance(module, FSDPModule)
            # Together they give a plain SUM. The factor alone would use PREMUL_SUM, which gloo does
            # not support.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _placement(size: int, parameter: nn.Parameter) -> Shard | None:
    """Shards experts by rows if their number is not a multiple of the ranks."""
    if parameter.ndim < 3 or to_local(parameter).shape[0] % size == 0:
        return None
    return Shard(0 if parameter.shape[1] % size else 1)


def _move_hooks(unit: nn.Module, block: nn.Module) -> None:
    """Gathers and frees a unit with its block, whose graph the unit's own hooks would break."""
    assert isinstance(unit, FSDPModule)
    state = unit._get_fsdp_state()
    state._pre_forward_hook_handle.remove()
    state._post_forward_hook_handle.remove()
    block.register_forward_pre_hook(state._pre_forward, prepend=True, with_kwargs=True)
    block.register_forward_hook(state._post_forward)
