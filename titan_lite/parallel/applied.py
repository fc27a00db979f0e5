"""The applied report: counted from the modules and checked against the configuration."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import get_args

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from titan_lite.config.activation_checkpoint import ActivationCheckpoint
from titan_lite.config.dims import FSDP
from titan_lite.config.schema import Compile, Parallel
from titan_lite.models.roles import PlanRow, Role
from titan_lite.nn.attention import Attention, DropoutAttention
from titan_lite.nn.dropout import Dropout
from titan_lite.nn.init import CHECKPOINT_PREFIX
from titan_lite.nn.moe import Experts
from titan_lite.nn.transformer import Transformer
from titan_lite.parallel.activation_checkpoint import is_checkpointed, memory_budget, saved_ops
from titan_lite.parallel.attention_kernel import applied_attention_kernel
from titan_lite.parallel.context import ShardedAttention, context_parallel
from titan_lite.parallel.expert import expert_parallel
from titan_lite.parallel.float8 import float8_linears, is_gathered_in_float8
from titan_lite.parallel.fsdp import precision, uses_symm_mem
from titan_lite.parallel.tensor import named_roles, split_modules
from titan_lite.runtime.shards import to_local

Modules = Mapping[str, Sequence[str]]
"""Feature -> names of the modules for which it is configured, or to which it is applied."""
MISMATCH = "applied features do not match the configuration: "


@dataclass(frozen=True, kw_only=True)
class Applied:
    """Features found on the modules after `parallelize`.

    modules: names by feature: "FSDP module", tensor-parallel roles, "float8 linear",
    "float8 all-gather", "ring attention over 4 ranks", "experts over 2 ranks" and the like,
    "checkpointed", "selectively checkpointed" except saved_ops, "compiled".
    mesh: degree of each axis over which parameters are laid out.
    sharded_parameters: parameter tensors of which a rank has a part; whole_parameters: others.
    attention: the only kernel that torch may use; "auto": any. merged_attention: kernels that
    attend to the keys of one rank at a time.
    dropout: kind of dropout -> number of modules.
    precision: dtypes of computation and of gradient reduction.
    symm_mem: parameters are gathered from symmetric memory.
    activation_memory_budget: the compiler's; 1.0: no budget.
    pipeline: the stages of all ranks, in words; all other fields count this rank's stages only.
    compiled_graphs, and their fused operations of async tensor parallel: known only after the first
    step.
    """

    blocks: int
    modules: Modules
    mesh: Mapping[str, int]
    sharded_parameters: int
    whole_parameters: int
    precision: str
    symm_mem: bool
    saved_ops: tuple[str, ...]
    activation_memory_budget: float
    attention: str
    dropout: Mapping[str, int]
    merged_attention: tuple[str, ...] = ()
    pipeline: str = ""
    compiled_graphs: int | None = None
    fused_all_gather_matmuls: int | None = None
    fused_matmul_reduce_scatters: int | None = None

    def count(self, feature: str) -> int:
        """Returns the number of modules with this feature."""
        return len(self.modules.get(feature, ()))

    def check(
        self,
        configured: Modules,
        activation_checkpoint: ActivationCheckpoint,
        parallel: Parallel,
        precision: str,
        attention: str,
    ) -> None:
        """Raises RuntimeError with all differences from the configuration: modules with missing
        or unexpected features, and other values."""
        degrees = {axis: getattr(parallel, axis) for axis in self.mesh if axis != "fsdp"}
        if parallel.dp_shard != -1:
            degrees["fsdp"] = math.prod(getattr(parallel, axis) for axis in FSDP)
        values = {
            "precision": (self.precision, precision),
            "symmetric memory": (self.symm_mem, parallel.fsdp_symm_mem and self.mesh["fsdp"] > 1),
            "attention": (self.attention, attention),
            **{axis: (self.mesh[axis], degree) for axis, degree in degrees.items()},
            "activation_checkpoint.save": (self.saved_ops, activation_checkpoint.saved_ops),
            "activation memory budget": (
                self.activation_memory_budget,
                activation_checkpoint.compiler_budget,
            ),
        }
        mismatches = [
            f"{name} is {actual}, but {expected} was configured"
            for name, (actual, expected) in values.items()
            if actual != expected
        ]
        for feature in dict.fromkeys((*configured, *self.modules)):
            expected, actual = set(configured.get(feature, ())), set(self.modules.get(feature, ()))
            for words, names in (("missing", expected - actual), ("unexpected", actual - expected)):
                if names:
                    mismatches.append(f"{words} {feature}: {', '.join(sorted(names))}")
        if mismatches:
            raise RuntimeError(MISMATCH + "; ".join(mismatches))

    def check_async_tp(self) -> None:
        """Raises RuntimeError if no all-gather, or no reduce-scatter, was fused with a matmul."""
        if not (self.fused_all_gather_matmuls and self.fused_matmul_reduce_scatters):
            raise RuntimeError(
                f"{MISMATCH}parallel.async_tp is true, but the compiler fused "
                f"{self.fused_all_gather_matmuls} all-gather-matmuls and "
                f"{self.fused_matmul_reduce_scatters} matmul-reduce-scatters; both must be above "
                "0. Set parallel.async_tp = false"
            )

    def compiled(self) -> str:
        """Describes the graphs that the first step compiled."""
        graphs = f"{self.compiled_graphs} graph{'s' * (self.compiled_graphs != 1)}"
        text = f"{self._compiled()} into {graphs}"
        if self.fused_all_gather_matmuls is not None:
            text += (
                f" with {self.fused_all_gather_matmuls} fused all-gather-matmuls and "
                f"{self.fused_matmul_reduce_scatters} fused matmul-reduce-scatters"
            )
        return text

    def __str__(self) -> str:
        """One line for each technique."""
        lines = {
            "mesh": " x ".join(f"{axis} {degree}" for axis, degree in self.mesh.items()),
            "FSDP2": (
                f"{self.count('FSDP module')} modules; {self.sharded_parameters} parameter tensors "
                f"sharded, {self.whole_parameters} whole; {self.precision}"
                f"{'; symmetric memory' if self.symm_mem else ''}"
            ),
            "tensor parallel": self._tensor_parallel(),
            "context parallel": self._over(" attention over"),
            "expert parallel": self._over("experts over"),
            "float8": (
                f"{self.count('float8 linear')} linears, {self.count('float8 all-gather')} of "
                "them all-gathered in float8"
            ),
            "attention": self._attention(),
            "checkpointed": self._checkpointed(),
            "compiled": self._compiled(),
            "pipeline": self.pipeline or "1 stage",
        }
        if self.dropout:
            places = [f"{what} in {number} places" for what, number in self.dropout.items()]
            lines["dropout"] = ", ".join(places)
        indent = "\n" + " " * 20
        return "\n".join(
            f"  {name:<16}  {text.replace(chr(10), indent)}" for name, text in lines.items()
        )

    def _tensor_parallel(self) -> str:
        roles = [f"{self.count(role)} {role}" for role in get_args(Role) if self.count(role)]
        return ", ".join(roles) or "0 modules"

    def _over(self, words: str) -> str:
        kinds = [f"{self.count(name)} {name}" for name in self.modules if words in name]
        return ", ".join(kinds) or "0 modules"

    def _attention(self) -> str:
        kernel = "torch's choice" if self.attention == "auto" else self.attention
        merged = " and ".join(self.merged_attention)
        return f"{kernel}; {merged} for the keys of each rank" if merged else kernel

    def _checkpointed(self) -> str:
        if self.activation_memory_budget < 1:
            return f"activation memory kept to {self.activation_memory_budget:g} by the compiler"
        blocks = self.count("checkpointed") + self.count("selectively checkpointed")
        saved = f"; saved: {', '.join(self.saved_ops)}" if self.saved_ops else ""
        return f"{blocks} of {self.blocks} blocks{saved}"

    def _compiled(self) -> str:
        return f"{self.count('compiled')} of {self.blocks} blocks"


def merge_applied(stages: Sequence[Applied]) -> Applied:
    """Merges the reports of all pipeline stages of this rank."""
    modules: dict[str, list[str]] = defaultdict(list)
    dropout: dict[str, int] = defaultdict(int)
    for stage in stages:
        for feature, names in stage.modules.items():
            modules[feature] += names
        for what, number in stage.dropout.items():
            dropout[what] += number
    return replace(
        stages[0],
        blocks=sum(stage.blocks for stage in stages),
        modules=dict(modules),
        sharded_parameters=sum(stage.sharded_parameters for stage in stages),
        whole_parameters=sum(stage.whole_parameters for stage in stages),
        saved_ops=max(stage.saved_ops for stage in stages),
        dropout=dict(dropout),
    )


def configured_modules(
    model: Transformer,
    tp_plan: tuple[PlanRow, ...],
    *,
    parallel: Parallel,
    activation_checkpoint: ActivationCheckpoint,
    compile: Compile,
    float8: Sequence[str],
    float8_all_gather: bool,
) -> Modules:
    """Returns the modules for which each feature is configured. float8: names of the linears to
    convert."""
    blocks = [f"layers.{name}" for name, _ in model.layers.named_children()]
    selective = activation_checkpoint.mode == "selective_op"
    configured: dict[str, Sequence[str]] = {
        "FSDP module": ["model", *model.ends, *blocks],
        "float8 linear": float8,
        "float8 all-gather": float8 if float8_all_gather else (),
        "selectively checkpointed" if selective else "checkpointed": [
            blocks[index] for index in activation_checkpoint.layers(len(blocks))
        ],
        "compiled": blocks if compile.covers("model") else (),
    }
    if parallel.cp > 1:
        configured[_attention_over(parallel.cp_method, parallel.cp)] = [
            name for name, module in _by_name(model).items() if isinstance(module, Attention)
        ]
    experts = [name for name, m in _by_name(model).items() if isinstance(m, Experts)]
    if parallel.ep > 1:
        configured[_experts_over(parallel.ep)] = experts
    if parallel.ep * parallel.tp > 1:
        configured["FSDP module"] = [*configured["FSDP module"], *experts]
    if parallel.tp > 1:
        for name, role in named_roles(_by_name(model), tp_plan):
            configured[role] = [*configured.get(role, ()), name]
    return configured


def count_applied(model: Transformer, tp_plan: tuple[PlanRow, ...], mesh: DeviceMesh) -> Applied:
    """Counts the features on every module and parameter of a parallelized model."""
    modules = _by_name(model)
    features: dict[str, list[str]] = defaultdict(list)
    saved: tuple[str, ...] = ()
    dropout: dict[str, int] = defaultdict(int)
    merged: set[str] = set()
    for name, module in modules.items():
        if isinstance(module, Dropout):
            dropout[f"{module.p:g} of hidden features"] += 1
        if isinstance(module, DropoutAttention):
            dropout[f"{module.p:g} of attention's weights"] += 1
        if isinstance(module, FSDPModule):
            features["FSDP module"].append(name)
        if is_checkpointed(module):
            ops = saved_ops(module)
            saved = saved or ops
            features["selectively checkpointed" if ops else "checkpointed"].append(name)
        if isinstance(module, Attention) and (kind := context_parallel(module)):
            features[_attention_over(*kind)].append(name)
        if degree := expert_parallel(module):
            features[_experts_over(degree)].append(name)
        if isinstance(module, ShardedAttention):
            merged.add(module.kernel)
    # The compiled module is a block, or the module inside its checkpoint wrapper.
    compiled = [name for name, m in model.named_modules() if m._compiled_call_impl is not None]
    features["compiled"] = [_clean(name) for name in compiled]
    for name, linear in float8_linears(model).items():
        features["float8 linear"].append(_clean(name))
        if is_gathered_in_float8(linear.weight):
            features["float8 all-gather"].append(_clean(name))
    for role, names in split_modules(modules, tp_plan).items():
        features[role] += names
    local = [to_local(p) for p in model.parameters()]
    whole = sum(
        part.numel() == p.numel() for part, p in zip(local, model.parameters(), strict=True)
    )
    return Applied(
        blocks=len(model.layers),
        modules=dict(features),
        mesh=dict(zip(mesh.mesh_dim_names or (), mesh.shape, strict=True)),
        sharded_parameters=len(local) - whole,
        whole_parameters=whole,
        precision=precision(model),
        symm_mem=uses_symm_mem(model),
        saved_ops=saved,
        activation_memory_budget=memory_budget(),
        attention=applied_attention_kernel(),
        merged_attention=tuple(sorted(merged)),
        dropout=dict(dropout),
    )


def _attention_over(method: str, degree: int) -> str:
    return f"{method} attention over {degree} ranks"


def _experts_over(degree: int) -> str:
    return f"experts over {degree} ranks"


def _by_name(model: nn.Module) -> dict[str, nn.Module]:
    """Returns modules by their names before wrapping; the model itself is "model"."""
    modules: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        # The checkpoint wrapper has the block's name and comes first, so it is the one to keep.
        modules.setdefault(_clean(name) or "model", module)
    return modules


def _clean(name: str) -> str:
    return f"{name}.".replace(CHECKPOINT_PREFIX, "").removesuffix(".")
