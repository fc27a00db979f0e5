"""The closed set of roles a module can play under tensor parallelism, and the rows of a plan."""

from dataclasses import dataclass
from typing import Literal

from titan_lite.models.patterns import matches

Role = Literal[
    # Embedding table split over the vocabulary; its output leaves split over the sequence.
    "vocab",
    # Linear split over output features; expects the whole sequence.
    "colwise",
    # Linear split over input features; its output is summed and leaves split over the sequence.
    "rowwise",
    # Kept whole on every rank, works on its own part of the sequence (norms, small linears).
    "sequence",
    # Kept whole on every rank, computes the same as on the others.
    "whole",
    # Kept whole on every rank, works on its own heads (norms of queries and keys).
    "heads",
    # Embedding table kept whole on every rank, looks up its own part of the sequence (positions,
    # token types).
    "positions",
    # Has no parameters: gathers its sequence-split input once for its children.
    "gather",
    # Has no parameters: passes on what is the same on every rank, to its own heads or part of the
    # sequence.
    "copy",
    # Chooses the experts of the tokens of its part of the sequence.
    "router",
    # Weights of all experts of a block, for tokens of its part of the sequence: never split.
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
"""What Muon steps."""


@dataclass(frozen=True)
class PlanRow:
    """All modules whose dotted name matches `pattern` (see models/patterns.py) play `role`.

    kind: of their parameters but biases; None: as KINDS has it, else "vector".
    """

    pattern: str
    role: Role
    kind: Kind | None = None

    def matches(self, module_name: str) -> bool:
        """Returns whether this row applies to the module."""
        return matches(self.pattern, module_name)


def kind_of(parameter: str, plan: tuple[PlanRow, ...]) -> Kind:
    """Returns the kind of a parameter by its name."""
    module, _, name = parameter.rpartition(".")
    if "bias" in name:
        return "vector"
    row = next((row for row in plan if row.matches(module)), None)
    return (row.kind or KINDS.get(row.role, "vector")) if row else "vector"
