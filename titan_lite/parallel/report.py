"""What was really applied, counted from the modules and checked against what was asked."""

from dataclasses import dataclass

from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from titan_lite.config.schema import ActivationCheckpoint, Compile
from titan_lite.nn.decoder import Decoder
from titan_lite.parallel.activation_checkpoint import is_checkpointed, memory_budget, saved_ops
from titan_lite.parallel.float8 import float8_linears, is_gathered_in_float8
from titan_lite.parallel.init_weights import CHECKPOINT_PREFIX


@dataclass(frozen=True, kw_only=True)
class Applied:
    """Counts of modules and parameters after `parallelize`.

    checkpointed_blocks: recomputed whole. selective_blocks: recomputed but for the saved_ops.
    activation_memory_budget: the compiler's, 1.0 where it has none to keep.
    compiled_graphs and the fused operations of async tensor parallel in them: known only after
    the first step.
    """

    blocks: int
    fsdp_units: int
    fsdp_candidates: int
    sharded_parameters: int
    unsharded_parameters: tuple[str, ...]
    checkpointed_blocks: int
    selective_blocks: int = 0
    saved_ops: tuple[str, ...] = ()
    activation_memory_budget: float = 1.0
    compiled_blocks: int
    compiled_graphs: int | None = None
    fused_all_gather_matmuls: int | None = None
    fused_matmul_reduce_scatters: int | None = None
    float8_linears: tuple[str, ...] = ()
    float8_gathered_weights: int = 0

    def check(self, *, activation_checkpoint: ActivationCheckpoint, compile: Compile) -> None:
        """Raises RuntimeError where the counts are not what the configuration asks for."""
        mismatches = []
        if self.fsdp_units != self.fsdp_candidates:
            mismatches.append(
                f"{self.fsdp_units} FSDP units where {self.fsdp_candidates} were asked for"
            )
        if self.unsharded_parameters:
            mismatches.append(f"parameters outside FSDP: {', '.join(self.unsharded_parameters)}")
        selective = activation_checkpoint.mode == "selective_op"
        asked = len(activation_checkpoint.layers(self.blocks))
        for feature, expected, found in (
            ("checkpointed", 0 if selective else asked, self.checkpointed_blocks),
            ("selectively checkpointed", asked if selective else 0, self.selective_blocks),
            ("compiled", self.blocks if compile.enable else 0, self.compiled_blocks),
        ):
            if found != expected:
                mismatches.append(f"{found} {feature} blocks where {expected} were asked for")
        names = tuple(activation_checkpoint.save) if selective else ()
        if self.saved_ops != names:
            mismatches.append(f"saved operations {self.saved_ops} where {names} were asked for")
        with_budget = activation_checkpoint.mode == "memory_budget"
        budget = activation_checkpoint.memory_budget if with_budget else 1.0
        if self.activation_memory_budget != budget:
            mismatches.append(
                f"an activation memory budget of {self.activation_memory_budget} where {budget} "
                "was asked for"
            )
        if mismatches:
            raise RuntimeError("what was applied is not what was asked: " + "; ".join(mismatches))

    def check_float8(self, asked: tuple[str, ...], *, fsdp_all_gather: bool) -> None:
        """Raises RuntimeError where not exactly the linears `asked` for are in float8."""
        mismatches = []
        for words, names in (
            ("not in float8", set(asked) - set(self.float8_linears)),
            ("in float8 unasked", set(self.float8_linears) - set(asked)),
        ):
            if names:
                mismatches.append(f"{words}: {', '.join(sorted(names))}")
        expected = len(asked) if fsdp_all_gather else 0
        if self.float8_gathered_weights != expected:
            mismatches.append(
                f"{self.float8_gathered_weights} weights are gathered in float8 where {expected} "
                "were asked for"
            )
        if mismatches:
            raise RuntimeError("what was applied is not what was asked: " + "; ".join(mismatches))

    def check_async_tp(self) -> None:
        """Raises RuntimeError where the compiler found nothing to overlap."""
        if not (self.fused_all_gather_matmuls and self.fused_matmul_reduce_scatters):
            raise RuntimeError(
                "what was applied is not what was asked: parallel.async_tp is true, but the first "
                f"step compiled {self.compiled()}"
            )

    def compiled(self) -> str:
        """What the first step compiled, in words."""
        text = f"{self.compiled_blocks} blocks into {self.compiled_graphs} graphs"
        if self.fused_all_gather_matmuls is not None:
            text += (
                f" with {self.fused_all_gather_matmuls} fused all-gather-matmuls and "
                f"{self.fused_matmul_reduce_scatters} fused matmul-reduce-scatters"
            )
        return text

    def __str__(self) -> str:
        return (
            f"{self.fsdp_units} FSDP units holding {self.sharded_parameters} parameters, "
            f"{self._checkpointing()}, {self.compiled_blocks} compiled, "
            f"{len(self.float8_linears)} linears in float8, {self.float8_gathered_weights} of them "
            "gathered in it"
        )

    def _checkpointing(self) -> str:
        if self.activation_memory_budget < 1:
            return f"activation memory kept to {self.activation_memory_budget:g} by the compiler"
        checkpointed, but_for = self.checkpointed_blocks + self.selective_blocks, ""
        if self.saved_ops:
            but_for = f" but for {', '.join(self.saved_ops)}"
        return f"{checkpointed} of {self.blocks} blocks checkpointed{but_for}"


def count_applied(model: Decoder) -> Applied:
    """Counts FSDP units, sharded parameters, checkpointed and compiled blocks."""
    blocks = list(model.layers.children())
    ends = (model.tok_embeddings, model.norm, model.output)
    parameters = dict(model.named_parameters())
    unsharded = [name for name, p in parameters.items() if not isinstance(p, DTensor)]
    float8 = float8_linears(model)
    selective = [ops for ops in map(saved_ops, blocks) if ops]
    return Applied(
        blocks=len(blocks),
        fsdp_units=sum(isinstance(module, FSDPModule) for module in model.modules()),
        fsdp_candidates=1 + len(blocks) + sum(end is not None for end in ends),
        sharded_parameters=len(parameters) - len(unsharded),
        unsharded_parameters=tuple(unsharded),
        checkpointed_blocks=sum(map(is_checkpointed, blocks)) - len(selective),
        selective_blocks=len(selective),
        saved_ops=selective[0] if selective else (),
        activation_memory_budget=memory_budget(),
        compiled_blocks=sum(block._compiled_call_impl is not None for block in blocks),
        float8_linears=tuple(name.replace(CHECKPOINT_PREFIX, "") for name in float8),
        float8_gathered_weights=sum(is_gathered_in_float8(m.weight) for m in float8.values()),
    )
