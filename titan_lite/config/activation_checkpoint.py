"""[activation_checkpoint]: a section for each mode."""

from typing import Annotated, Literal

from pydantic import Field

from titan_lite.config.section import Dropped, Positive, Section
from titan_lite.config.tagged import TaggedTable

SavedOp = Literal[
    "attention",
    "matmul",
    "every_second_matmul",
    "reduce_scatter",
    "all_reduce",
    "max",
    "routing",
    "all_to_all",
    "grouped_matmul",
]


class ActivationCheckpoint(Section):
    """[activation_checkpoint]: activations that backward recomputes instead of keeping them."""

    mode: str
    """Blocks or operations that are recomputed in backward. "full": every transformer block;
    "every_nth", "first_k", "fraction": some of the blocks; "selective_op": all operations of each
    block except those in `save`; "memory_budget": operations that the compiler chooses, which
    requires compile and tp = 1. Each mode reads the key of its name, "selective_op" reads
    `save`."""

    def layers(self, num_layers: int) -> range:
        """The blocks that are checkpointed, out of `num_layers` of a model or pipeline stage."""
        return range(0)

    @property
    def saved_ops(self) -> tuple[SavedOp, ...]:
        """Names of the operations whose results checkpointed blocks keep."""
        return ()

    @property
    def compiler_budget(self) -> float:
        """Share of the activation memory of a compiled block that may be used."""
        return 1.0


class NoCheckpoint(ActivationCheckpoint):
    """Keeps all activations."""

    mode: Literal["none"] = "none"


class Full(ActivationCheckpoint):
    """Recomputes every block."""

    mode: Literal["full"] = "full"

    def layers(self, num_layers: int) -> range:
        """All blocks."""
        return range(num_layers)


class EveryNth(ActivationCheckpoint):
    """Recomputes every n-th block."""

    mode: Literal["every_nth"] = "every_nth"
    every_nth: Positive = 2
    """Recompute the first of every n blocks (of each pipeline stage); 1 is "full"."""

    def layers(self, num_layers: int) -> range:
        """The first of n, not the last.

        Backward starts with the last block, while all other activations are still in memory: a
        recomputed block would raise the peak.
        """
        return range(0, num_layers, self.every_nth)


class FirstK(ActivationCheckpoint):
    """Recomputes the first blocks."""

    mode: Literal["first_k"] = "first_k"
    first_k: Positive = 1
    """Number of blocks that are recomputed, the first ones (of each pipeline stage)."""

    def layers(self, num_layers: int) -> range:
        """The first blocks."""
        return range(min(self.first_k, num_layers))


class FractionOfBlocks(ActivationCheckpoint):
    """Recomputes a fraction of the blocks."""

    mode: Literal["fraction"] = "fraction"
    fraction: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of the blocks that are recomputed, the first ones (of each pipeline stage), rounded
    down. It is an error if no block is left."""

    def layers(self, num_layers: int) -> range:
        """The first blocks."""
        return range(int(num_layers * self.fraction))


class SelectiveOp(ActivationCheckpoint):
    """Recomputes all operations of every block but some."""

    mode: Literal["selective_op"] = "selective_op"
    save: list[SavedOp] = ["attention", "every_second_matmul", "reduce_scatter", "max"]
    """Operations whose results are kept. "attention": attention. "matmul": all matmuls;
    "every_second_matmul": every second one. "reduce_scatter" and "all_reduce": the sums over
    tensor-parallel ranks, with and without sequence parallel. "max": the amax reduction for the
    scales of "tensorwise" float8. For experts: "routing": the sorting by which experts are chosen;
    "all_to_all": the exchanges of expert parallel; "grouped_matmul": the matmuls of the experts."""

    def layers(self, num_layers: int) -> range:
        """All blocks."""
        return range(num_layers)

    @property
    def saved_ops(self) -> tuple[SavedOp, ...]:
        """Names of the operations whose results checkpointed blocks keep."""
        return tuple(self.save)


class MemoryBudget(ActivationCheckpoint):
    """The compiler chooses the operations to recompute."""

    mode: Literal["memory_budget"] = "memory_budget"
    memory_budget: Dropped = 0.5
    """Share of the activation memory of a compiled block that may be used; 0 keeps its input only,
    1 would recompute nothing."""

    @property
    def compiler_budget(self) -> float:
        """Share of the activation memory of a compiled block that may be used."""
        return self.memory_budget


CHECKPOINT_MODES = TaggedTable("mode", ActivationCheckpoint)
for section in (
    NoCheckpoint,
    Full,
    EveryNth,
    FirstK,
    FractionOfBlocks,
    SelectiveOp,
    MemoryBudget,
):
    CHECKPOINT_MODES.add(section)
