"""Tensor parallelism: translates the rows of a family's plan to DTensor styles.

With sequence parallelism activations between blocks are split over the sequence, Shard(1) of
(B, S, D): a block gathers them before its matmuls and scatters their sum (arXiv:2205.05198).
Without it they are whole on every rank. Between modules they are plain tensors.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from titan_lite.models.roles import PlanRow, Role
from titan_lite.nn.attention import DropoutAttention
from titan_lite.nn.dropout import Dropout
from titan_lite.nn.moe import MoE
from titan_lite.nn.transformer import Transformer
from titan_lite.parallel.float8 import float8_styles, in_float8_styles
from titan_lite.runtime.collectives import AsyncCollectiveTensor

WEIGHT_PLACEMENTS: dict[Role, Placement] = {
    "vocab": Shard(0),
    "colwise": Shard(0),
    "rowwise": Shard(1),
    "sequence": Replicate(),
    "whole": Replicate(),
    "heads": Replicate(),
    "positions": Replicate(),
    "router": Replicate(),
    "head": Shard(0),
}
"""Placement of a weight (out, in) on the tensor-parallel axis."""


class VocabParallelEmbedding(RowwiseParallel):
    """Rowwise embedding that waits for its output: compiled blocks accept no pending tensor."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        module = super()._apply(module, device_mesh)
        # clone() waits, and unlike wait() stays in the autograd graph.
        module.register_forward_hook(
            lambda _module, _inputs, output: (
                output.clone() if isinstance(output, AsyncCollectiveTensor) else output
            )
        )
        return module


class ModuleStyle(ParallelStyle):
    """Splits a module's parameters, and converts its inputs and output, by three functions.

    They are called like those of torch.distributed.tensor.distribute_module.
    """

    def __init__(self, split: Any, take: Any = None, give: Any = None) -> None:
        self.functions = split, take, give

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return distribute_module(module, device_mesh, *self.functions)


class RouterParallel(ParallelStyle):
    """Does not change the forward; buffers stay plain tensors."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        distribute_parameters(module, device_mesh, Replicate())
        return module


def distribute_parameters(module: nn.Module, mesh: DeviceMesh, placement: Placement) -> None:
    """Replaces a module's own parameters by DTensors.

    Without a broadcast: they are initialized later, equally on every rank, and fake tensors of a
    dry run cannot be sent.
    """
    for name, parameter in list(module.named_parameters(recurse=False)):
        part = distribute_tensor(parameter, mesh, [placement], src_data_rank=None)
        module.register_parameter(name, nn.Parameter(part))


def check_plan(model: Transformer, plan: tuple[PlanRow, ...]) -> None:
    """Raises ValueError for a parameter whose module does not match exactly one row."""
    for name, _ in model.named_parameters():
        rows = [row.pattern for row in plan if row.matches(name.rpartition(".")[0])]
        if len(rows) != 1:
            raise ValueError(
                f"parallel.tp cannot split {name}: it matches {len(rows)} rows of the family's "
                "tp_plan; exactly 1 is required"
            )


def apply_tp(
    model: Transformer, mesh: DeviceMesh, plan: tuple[PlanRow, ...], *, sequence_parallel: bool
) -> None:
    """Splits the model in place over the 1D `mesh`, each module by the role in its plan row."""
    between: Placement = Shard(1) if sequence_parallel else Replicate()
    parallelize_module(model, mesh, dict(_styles(model, plan, between)))
    # The styles have split both weights separately: tie them again.
    model.tie()
    for module in model.modules():
        if isinstance(module, DropoutAttention) or (
            isinstance(module, Dropout) and sequence_parallel
        ):
            module.shard = mesh.get_local_rank()


def named_roles(
    modules: Mapping[str, nn.Module], plan: tuple[PlanRow, ...]
) -> Iterator[tuple[str, Role]]:
    """Names of the modules that tensor parallel lays out, with their roles in the plan."""
    for row in plan:
        for name, module in modules.items():
            # Experts work on this rank's part of the sequence; FSDP2 shards them.
            gathers_for_experts = row.role == "gather" and isinstance(module, MoE)
            if row.matches(name) and row.role != "expert" and not gathers_for_experts:
                yield name, row.role


def split_modules(
    modules: Mapping[str, nn.Module], plan: tuple[PlanRow, ...]
) -> dict[Role, list[str]]:
    """Returns by role the names of the modules that tensor parallel lays out."""
    by_role = defaultdict(list)
    for name, role in named_roles(modules, plan):
        if _plays(modules[name], role):
            by_role[role].append(name)
    return dict(by_role)


def _plays(module: nn.Module, role: Role) -> bool:
    if role in ("gather", "copy"):
        # FSDP2's own hook is on each of its units.
        hooks = module._forward_pre_hooks.values()
        return any(not hook.__module__.startswith("torch.distributed.fsdp") for hook in hooks)
    weight = next(module.parameters())
    if not isinstance(weight, DTensor) or "tp" not in (weight.device_mesh.mesh_dim_names or ()):
        return False
    return weight.placements[-1] == WEIGHT_PLACEMENTS[role]


def _styles(
    model: Transformer, plan: tuple[PlanRow, ...], between: Placement
) -> Iterator[tuple[str, ParallelStyle]]:
    float8 = in_float8_styles(model, plan)
    for name, role in named_roles(dict(model.named_modules()), plan):
        yield name, _style(role, between, float8=name in float8)


def _style(role: Role, between: Placement, *, float8: bool) -> ParallelStyle:
    styles = (ColwiseParallel, RowwiseParallel, PrepareModuleInput)
    colwise, rowwise, gather = float8_styles() if float8 else styles
    # Computes the same on every rank; weights are DTensors, like the sharded ones.
    whole = ModuleStyle(_replicate, _as_replicated, _to_local)
    match role:
        case "vocab":
            return VocabParallelEmbedding(input_layouts=Replicate(), output_layouts=between)
        case "colwise":
            return colwise()
        case "rowwise":
            return rowwise(output_layouts=between)
        case "sequence":
            # A norm does not care which dim is sharded; dim 0 lets the linear flatten (B, S).
            split = SequenceParallel(sequence_dim=0, use_local_output=True)
            return split if between.is_shard() else whole
        case "whole":
            return whole
        case "gather":
            return gather(input_layouts=(between,), desired_input_layouts=(Replicate(),))
        case "heads":
            # The input is (B, S, heads, features).
            return SequenceParallel(sequence_dim=2, use_local_output=True)
        case "positions":
            # Looks up this rank's part of the sequence in a replicated table.
            return ModuleStyle(_replicate, partial(_own_positions, between), _to_local_copy)
        case "copy":
            # Returns its input, which is equal on all ranks; sums the gradients of all ranks.
            return ModuleStyle(None, _as_replicated, _to_local_with_summed_gradient)
        case "router":
            return RouterParallel()
        case "head":
            # The output stays split over the vocabulary: the head computes logits or a loss from
            # DTensors. Each rank's gradient of the input is Partial, and is summed in backward.
            return ModuleStyle(_split_rows, partial(_gather_first, between))
        case "expert":
            raise AssertionError("not laid out by tensor parallel")


def _replicate(_name: str, module: nn.Module, mesh: DeviceMesh) -> None:
    distribute_parameters(module, mesh, Replicate())


def _split_rows(_name: str, module: nn.Module, mesh: DeviceMesh) -> None:
    distribute_parameters(module, mesh, Shard(0))


def _as_replicated(_module: nn.Module, inputs: Any, mesh: DeviceMesh) -> Any:
    if isinstance(inputs[0], DTensor):
        return inputs[0]
    return DTensor.from_local(inputs[0], mesh, [Replicate()], run_check=False)


def _own_positions(between: Placement, module: nn.Module, inputs: Any, mesh: DeviceMesh) -> Any:
    rows_S = _as_replicated(module, inputs, mesh)
    own = Shard(rows_S.ndim - 1) if between.is_shard() else Replicate()
    return rows_S.redistribute(placements=[own])


def _gather_first(between: Placement, _head: nn.Module, inputs: Any, mesh: DeviceMesh) -> Any:
    x_BSD, *rest = inputs
    x_BSD = DTensor.from_local(x_BSD, mesh, [between], run_check=False)
    return x_BSD.redistribute(placements=[Replicate()]), *rest


def _to_local(_module: nn.Module, output: Any, _mesh: DeviceMesh) -> Any:
    return output.to_local()


def _to_local_copy(_module: nn.Module, output: Any, _mesh: DeviceMesh) -> Any:
    # FSDP warns about outputs that are views.
    return output.to_local().clone()


def _to_local_with_summed_gradient(_module: nn.Module, output: Any, _mesh: DeviceMesh) -> Any:
    return output.to_local(grad_placements=[Partial()])
