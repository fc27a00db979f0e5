"""[optimizer]: a section for each optimizer, and the function that builds it."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from titan_lite.config.needs import Needs
from titan_lite.config.registry import Registry
from titan_lite.config.section import (
    Dropped,
    NonNegativeFloat,
    PositiveFloat,
    Section,
)
from titan_lite.config.tagged import TaggedTable

# Values of AdamOptimizer.state_dtype that are stored in torchao's tensors.
EIGHT_BITS = ("int8", "float8")
# By AdamOptimizer.state_dtype: bytes of a moment (256 elements in 8 bits have a scale in float32),
# and bytes per element that are computed at once in a step that rounds moments, as dry runs have
# them.
MOMENT_BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1 + 4 / 256, "float8": 1 + 4 / 256}
ROUNDING_BYTES = {"float32": 0, "bfloat16": 32, "int8": 66, "float8": 32}


class OptimizerGroup(Section):
    """[[optimizer.groups]]: separate settings of some parameters."""

    pattern: Annotated[str, Field(min_length=1)]
    """Names of parameters, in which "*" stands for any characters, dots included, and [qk] for q or
    k: "layers.*.attention.w[qk].weight"."""
    lr_factor: NonNegativeFloat = 1.0
    """Factor of the learning rate."""
    weight_decay: NonNegativeFloat | None = None
    """Weight decay, also for the kinds in optimizer.no_decay; not set: as without the group."""
    algorithm: str = ""
    """With Muon: "muon" or "adamw"; empty: as without the group."""


class Optimizer(Section):
    """[optimizer]: how parameters are updated."""

    ALGORITHMS: ClassVar[tuple[str, ...]] = ()
    """Values of a group's `algorithm`."""

    name: str
    """The optimizer. "AdamW": weight decay is separate from the gradient; "Adam": the decay is
    added to the gradient; "Muon": the momentum of matrices is orthogonalized, and AdamW updates the
    other parameters."""
    lr: PositiveFloat = 3e-4
    """Peak learning rate."""
    weight_decay: NonNegativeFloat = 0.1
    """Weight decay of the parameters that `no_decay` does not name."""
    no_decay: Annotated[
        list[Literal["norm", "bias", "embedding"]], Needs("weight_decay", above=0)
    ] = ["norm", "bias"]
    """Kinds of parameters without weight decay."""
    groups: list[OptimizerGroup] = []
    """Separate settings for some parameters, each in a table [[optimizer.groups]]. The first table
    whose `pattern` matches a parameter's name applies."""

    @property
    def state_bytes(self) -> float:
        """Bytes of state per parameter, for the planner."""
        return 8.0

    @property
    def rounding_bytes(self) -> int:
        """Bytes per element of the largest tensor that a step uses, for the planner."""
        return 0


class AdamOptimizer(Optimizer):
    """Keys of AdamW and Adam."""

    beta1: Dropped = 0.9
    """Decay of the first moment."""
    beta2: Dropped = 0.95
    """Decay of the second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the denominator."""
    implementation: Annotated[
        Literal["auto", "fused", "foreach", "for-loop"], Needs("state_dtype", values=("float32",))
    ] = "auto"
    """torch's implementation of the step; "auto": fused if the device supports it."""
    state_dtype: Literal["float32", "bfloat16", "int8", "float8"] = "float32"
    """Type in which both moments are stored; the step is computed in float32, one parameter after
    the other. "bfloat16" halves their memory, with equal results in every layout; it requires beta1
    and beta2 of at most 0.99. "int8" and "float8" need a quarter; results depend on the layout,
    because 256 elements of a shard share a scale."""

    @property
    def state_bytes(self) -> float:
        """Bytes of both moments per parameter."""
        return 2 * MOMENT_BYTES[self.state_dtype]

    @property
    def rounding_bytes(self) -> int:
        """Bytes per element of float32 copies in a step."""
        return ROUNDING_BYTES[self.state_dtype]


class AdamW(AdamOptimizer):
    """Adam with decoupled weight decay (arXiv:1711.05101)."""

    name: Literal["AdamW"] = "AdamW"


class Adam(AdamOptimizer):
    """Adam whose weight decay is part of the gradient (arXiv:1412.6980)."""

    name: Literal["Adam"] = "Adam"


class Muon(AdamOptimizer):
    """Matrices of attention and feed-forward by Muon (arXiv:2502.16982), the rest by AdamW."""

    ALGORITHMS: ClassVar[tuple[str, ...]] = ("muon", "adamw")

    name: Literal["Muon"] = "Muon"
    momentum: Dropped = 0.95
    """Decay of the average of gradients that is orthogonalized."""
    nesterov: bool = True
    """Use Nesterov momentum."""
    adjust_lr: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """Factor of a matrix' learning rate. "match_rms_adamw": 0.2 sqrt(max(rows, columns)), for
    AdamW's learning rate and decay; "original": sqrt(max(1, rows / columns)), for learning rates
    near 0.02."""
    ns_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of Newton-Schulz; "auto": float32 with training.param_dtype "float32", else
    bfloat16."""
    ns_coefficients: Annotated[list[float], Field(min_length=3, max_length=3)] = [
        3.4445,
        -4.7750,
        2.0315,
    ]
    """Factors of x, x^3 and x^5 in an iteration of Newton-Schulz."""
    ns_steps: Annotated[int, Field(gt=0, lt=100)] = 5
    """Iterations of Newton-Schulz."""
    per_head: bool = False
    """Orthogonalize each head of queries, keys and values as a separate matrix."""


OPTIMIZERS = TaggedTable("name", Optimizer)
BUILDERS: Registry[tuple[type[Optimizer], str]] = Registry("optimizer")
"""Name -> its section, and "module:function" of an optim.optimizer.Builder."""


def register_optimizer(section: type[Optimizer], build: str) -> None:
    """Adds an optimizer under the default of its section's `name`, by the path of its builder."""
    BUILDERS.register(section.model_fields["name"].default, (section, build))
    OPTIMIZERS.add(section)


register_optimizer(AdamW, "titan_lite.optim.optimizer:build_adam")
register_optimizer(Adam, "titan_lite.optim.optimizer:build_adam")
register_optimizer(Muon, "titan_lite.optim.muon:build_muon")
