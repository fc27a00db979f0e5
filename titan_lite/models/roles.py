"""The roles of modules under tensor parallelism, and the rows of a tensor-parallel plan."""

from dataclasses import dataclass
from typing import Literal

from titan_lite.models.patterns import matches

Role = Literal[
    # Embedding table split over the vocabulary; its output is split over the sequence.
    "vocab",
    # Linear split over output features; expects the whole sequence.
    "colwise",
    # Linear split over input features; its output is summed, and split over the sequence.
    "rowwise",
    # Whole on every rank; computes the rank's part of the sequence (norms, small linears).
    "sequence",
    # Whole on every rank; all ranks compute the same.
    "whole",
    # Whole on every rank; computes the rank's heads (norms of queries and keys).
    "heads",
    # Embedding table that is whole on every rank; looks up the rank's part of the sequence
    # (positions, token types).
    "positions",
    # Without parameters: gathers its input, which is split over the sequence, for its children.
    "gather",
    # Without parameters: its input is equal on all ranks, and is used by each rank's heads or part
    # of the sequence, so backward sums gradients over ranks.
    "copy",
    # Chooses experts for the tokens of the rank's part of the sequence.
    "router",
    # Weights of a block's experts, for tokens of the rank's part of the sequence; never split.
    "expert",
    # Output projection split over the vocabulary; gathers the sequence, the logits stay split.
    "head",
]


Kind = Literal["embedding", "head", "matrix", "expert", "router", "vector"]
"""What a parameter is to an optimizer; "vector": norms, biases, and small linears of no role."""

KINDS: dict[Role, Kind] = {
    "vocab": "embedding",
    "positions": "embedding",
    "head": "head",
    "colwise": "matrix",
    "rowwise": "matrix",
    "router": "router",
    "expert": "expert",
}
MATRIX_KINDS: tuple[Kind, ...] = ("matrix", "expert", "router")
"""Kinds that Muon updates."""


@dataclass(frozen=True)
class PlanRow:
    """Gives `role` to all modules whose dotted name matches `pattern` (see models/patterns.py).

    kind: kind of their parameters except biases; None: the role's in KINDS, or "vector".
    """

    pattern: str
    role: Role
    kind: Kind | None = None

    def matches(self, module_name: str) -> bool:
        """Returns True if this row applies to the module."""
        return matches(self.pattern, module_name)


def kind_of(parameter: str, plan: tuple[PlanRow, ...]) -> Kind:
    """Returns the kind of a parameter by its name."""
    module, _, name = parameter.rpartition(".")
    if "bias" in name:
        return "vector"
    row = next((row for row in plan if row.matches(module)), None)
    return (row.kind or KINDS.get(row.role, "vector")) if row else "vector"
