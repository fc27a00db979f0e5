"""The parity matrix as data: which runs must equal one process, how closely, and what is refused.

A new parallel layout is an entry of LAYOUTS and a row of MATRIX; a new precision is a row of
IN_PRECISION; a new family has to meet each of FEATURES in a row of FAMILIES; a combination that the
library refuses is a line of HOLES.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

from tests.runs import LATER
from titan_lite.config.dims import ParallelDims
from titan_lite.config.load import load_config
from titan_lite.config.schema import Config

# One global batch for all of them. Few chunks of the loss, each of which waits twice for the other
# tensor-parallel ranks.
BATCH = 16
EVERYWHERE = (
    "training.seq_len=32",
    f"training.steps={LATER[-1]}",
    f"training.global_batch_size={BATCH}",
    "training.loss_chunks=2",
)

# Relative, as `deviations` of tests/runs.py; docs/numerics.md has the reason for each bound.
TOLERANCES = {
    "initial weights": 0.0,
    # float32 sums in another order differ by some 1e-7, of which training makes more.
    "loss": 1e-5,
    "grad_norm": 1e-5,
    # From the same weights, so that nothing is magnified.
    **{f"gradients of step {step}": 1e-6 for step in (1, *LATER)},
}
TOLERANCES_OF_3_STEPS = {
    name: bound for name, bound in TOLERANCES.items() if name != f"gradients of step {LATER[-1]}"
}

TP2, TP4, HSDP2 = "parallel.tp=2", "parallel.tp=4", "parallel.dp_replicate=2"
CP2, CP4, PP2, PP4 = "parallel.cp=2", "parallel.cp=4", "parallel.pp=2", "parallel.pp=4"
EP2, EP4 = "parallel.ep=2", "parallel.ep=4"
SAVE_EXPERTS = 'activation_checkpoint.save=["routing", "all_to_all", "grouped_matmul"]'
ALL_GATHER, ULYSSES = "parallel.cp_method=all_gather", "parallel.cp_method=ulysses"
NO_SEQUENCE_PARALLEL = "parallel.sequence_parallel=false"
SYNC_LAST = "parallel.gradient_sync=last_micro_batch"
NEVER = "parallel.reshard_after_forward=never"

# Processes, and the settings that lay them out.
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "1 process": (1, ()),
    "dp2": (2, ()),
    "dp4": (4, ()),
    "hsdp 2x1": (2, (HSDP2,)),
    "hsdp 2x2": (4, (HSDP2,)),
    "tp2": (2, (TP2,)),
    "tp4": (4, (TP4,)),
    "dp2 x tp2": (4, (TP2,)),
    "hsdp 2x1 x tp2": (4, (HSDP2, TP2)),
    "hsdp 2x2 x tp2": (8, (HSDP2, TP2)),
    "cp2": (2, (CP2,)),
    "cp4": (4, (CP4,)),
    "dp2 x cp2": (4, (CP2,)),
    "cp2 x tp2": (4, (CP2, TP2)),
    "dp2 x cp2 x tp2": (8, (CP2, TP2)),
    "pp2": (2, (PP2,)),
    "pp4": (4, (PP4,)),
    "pp2 x dp2": (4, (PP2,)),
    "pp2 x tp2": (4, (PP2, TP2)),
    "pp2 x cp2": (4, (PP2, CP2)),
    "pp2 x dp2 x tp2": (8, (PP2, TP2)),
}

MODES = ("none", "full", "selective_op")
# As compile, without inductor's kernels, which take a cold cache 10 to 20 seconds per graph.
TRACED = "aot_eager"
ACCUMULATIONS = (1, 4)

# Execution and micro-batches under each mode of activation checkpointing: every two values of any
# two axes meet. Each graph that inductor compiles, of a local batch, a layout and a mode, costs a
# cold cache 10 to 20 seconds: dp4 and hsdp 2x2 have the same one.
MATRIX = {
    #                  none           full           selective_op
    "dp2":            ("compile x 1", "eager x 4",   "eager x 1"),
    "dp4":            ("eager x 4",   "compile x 1", "eager x 1"),
    "hsdp 2x2":       ("eager x 1",   "compile x 1", "eager x 4"),
    "tp2":            ("eager x 1",   "eager x 1",   "compile x 4"),
    "tp4":            ("eager x 1",   "eager x 1",   "aot_eager x 4"),
    "dp2 x tp2":      ("eager x 1",   "aot_eager x 4", "eager x 1"),
    "hsdp 2x1 x tp2": ("eager x 4",   "eager x 1",   "aot_eager x 1"),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A run to compare with one process in eager mode, without checkpointing or accumulation.

    more: further settings of this run. alike: settings that the one process gets as
    well, since they make another model or precision.
    """

    layout: str
    mode: str = "none"
    execution: str = "eager"
    micro_batches: int = 1
    more: tuple[str, ...] = ()
    alike: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = (self.layout, self.mode, self.cell, *self.more, *self.alike)
        return ", ".join(parts)

    @property
    def splits_backward(self) -> bool:
        """Returns whether the pipeline schedule splits backward."""
        return any(name in setting for name in ("ZeroBubble", "DualPipeV") for setting in self.more)

    @property
    def cell(self) -> str:
        """The cell as MATRIX writes it."""
        return f"{self.execution} x {self.micro_batches}"

    @property
    def world_size(self) -> int:
        """Processes."""
        return LAYOUTS[self.layout][0]

    @property
    def settings(self) -> tuple[str, ...]:
        """All that differs from the one process."""
        world_size, layout = LAYOUTS[self.layout]
        parallel = load_config(None, as_overrides(*layout)).config.parallel
        ranks = ParallelDims.resolve(parallel, world_size).batch
        return (
            *layout,
            f"training.local_batch_size={BATCH // (ranks * self.micro_batches)}",
            f"activation_checkpoint.mode={self.mode}",
            f"compile.enable={str(self.execution != 'eager').lower()}",
            *self.more,
        )


def as_overrides(*settings: str) -> list[str]:
    """Settings as arguments of the command line."""
    return [f"--{setting}" for setting in settings]


def _cases() -> Iterator[Case]:
    for layout, cells in MATRIX.items():
        for mode, cell in zip(MODES, cells, strict=True):
            execution, _, micro_batches = cell.partition(" x ")
            yield Case(layout, mode, execution, int(micro_batches))


CASES = tuple(_cases())

FOUR_LAYERS = ("model.num_layers=4",)
TIED = ("model.tied_head=true",)
HIDDEN_DROPOUT = ("model.hidden_dropout=0.1",)
MUON = ("optimizer.name=Muon",)
LONG_MUON = (*MUON, "training.steps=20")
EMA = (
    "ema.enable=true",
    "ema.decay=0.5",
    "validation.enable=true",
    "validation.interval=2",
    "validation.steps=1",
)
MOMENTS = ("optimizer.state_dtype=bfloat16",)
DROPOUT = (*HIDDEN_DROPOUT, "model.attention_dropout=0.1")


def schedule(name: str) -> str:
    """The setting of a pipeline's schedule."""
    return f"parallel.pp_schedule={name}"


FURTHER = (
    Case("1 process", micro_batches=4),
    Case("dp4", more=("parallel.reshard_after_forward=always",)),
    Case("dp4", more=(NEVER,)),
    Case("hsdp 2x2 x tp2", "full"),
    Case("dp4", more=("parallel.reshard_after_forward=2",)),
    Case("dp4", micro_batches=4, more=(NEVER, SYNC_LAST)),
    Case("dp2", more=("parallel.cpu_offload=true",)),
    Case("dp2", "full", more=("training.loss_chunks=1",)),
    Case("tp2", more=(NO_SEQUENCE_PARALLEL,)),
    Case("hsdp 2x1", micro_batches=4, more=(SYNC_LAST,)),
    # Clipped, as the others are not: a gradient that is clipped hides its scale.
    Case("tp2", alike=("training.max_norm=0.2",)),
    # Padded to 2176 rows, of which the last 127 stay zero.
    Case("tp2", alike=("model.vocab_size=2049",)),
    Case("tp2", alike=TIED),
    Case("cp2"),
    Case("cp4", micro_batches=2, more=(ALL_GATHER, SYNC_LAST)),
    Case("dp2 x cp2", "full"),
    Case("cp2 x tp2", "selective_op", more=(ULYSSES,)),
    Case("dp2 x cp2 x tp2"),
    Case("cp2 x tp2", "full", micro_batches=2, alike=HIDDEN_DROPOUT),
    Case("pp2", "selective_op", "compile", micro_batches=4, alike=FOUR_LAYERS),
    Case("pp2", micro_batches=4, more=(schedule("GPipe"),), alike=FOUR_LAYERS),
    Case("pp2", "full", micro_batches=4, more=(schedule("Interleaved1F1B"),), alike=FOUR_LAYERS),
    Case("pp2", micro_batches=4, more=(schedule("LoopedBFS"),), alike=FOUR_LAYERS),
    Case("pp2", micro_batches=4, more=(schedule("InterleavedZeroBubble"),), alike=FOUR_LAYERS),
    Case("pp2", "full", micro_batches=4, more=(schedule("ZBVZeroBubble"),), alike=FOUR_LAYERS),
    Case("pp2", micro_batches=4, more=(schedule("DualPipeV"),), alike=FOUR_LAYERS),
    # Two passes, each with its own reduction.
    Case("pp2", micro_batches=8, more=("parallel.pp_micro_batches=4",), alike=FOUR_LAYERS),
    Case("pp4", micro_batches=4, alike=("model.num_layers=5",)),
    Case("pp2 x dp2", micro_batches=4, more=(schedule("ZBVZeroBubble"),), alike=FOUR_LAYERS),
    Case("pp2 x tp2", micro_batches=4, more=(schedule("Interleaved1F1B"),), alike=FOUR_LAYERS),
    Case("pp2 x cp2", micro_batches=4, alike=FOUR_LAYERS),
    Case("pp2 x dp2 x tp2", "full", micro_batches=2, alike=(*FOUR_LAYERS, *TIED)),
    # Shards that FSDP2 makes of tensor parallel's, replicas that share the work, and stages.
    Case("dp2 x tp2", alike=LONG_MUON),
    Case("hsdp 2x2", micro_batches=4, alike=LONG_MUON),
    Case("pp2 x dp2", micro_batches=4, alike=LONG_MUON),
    # The loss of validation is the average's.
    Case("dp2", alike=EMA),
    Case("hsdp 2x2", micro_batches=4, alike=EMA),
    Case("tp2", alike=EMA),
    Case("pp2", micro_batches=4, alike=EMA),
    Case("dp2", alike=MOMENTS),
    Case("hsdp 2x2", micro_batches=4, alike=MOMENTS),
    Case("tp2", alike=MOMENTS),
    Case("pp2", micro_batches=4, alike=MOMENTS),
)


def family(name: str, *more: str) -> tuple[str, ...]:
    """The settings of a family's debug flavor, and `more` of them."""
    return f"model.name={name}", *more


# Softmax does not see what is added to all keys: where they are not rotated, the gradient of their
# bias is rounding.
GPT = family("gpt", "model.qkv_bias=false")
INTERNLM = family("internlm")
QWEN = family("qwen")
QWEN2_5 = family("qwen2.5", "model.num_kv_heads=8")
QWEN3 = family("qwen3")
QWEN3_MOE = family("qwen3_moe", "model.balance_coeff=0.1")
# No number of ranks here divides 7: the rows of each expert are sharded.
MIXTRAL = family(
    "mixtral",
    "model.num_experts=7",
    "model.z_loss_coeff=0.01",
    "model.route_bias=true",
    "model.bias_rate=0.01",
)
SEQUENCE_LOSS = ("model.balance_loss=sequence", "model.balance_coeff=0.1")
DEEPSEEK = family(
    "deepseek_v3",
    "model.bias_rate=0.01",
    "model.balance_loss=global_lagged",
    "model.balance_coeff=0.1",
)
# V3's own loss, of sequences that ranks have parts of.
DEEPSEEK_OVER_SEQUENCES = family("deepseek_v3", "model.balance_coeff=0.1")
GPT_NEOX = family("gpt_neox")
BERT = family("bert", "model.qkv_bias=false")
MEGATRON_BERT = family("megatron_bert", "model.qkv_bias=false")
FAMILIES = (
    Case("hsdp 2x1", "none", "compile", 4, alike=INTERNLM),
    Case("dp2 x tp2", "selective_op", alike=INTERNLM),
    Case("pp2 x cp2", "full", micro_batches=4, alike=INTERNLM),
    Case("hsdp 2x1", "none", TRACED, 4, alike=QWEN),
    Case("pp2 x tp2", "selective_op", micro_batches=4, alike=QWEN),
    Case("cp2", "full", alike=QWEN),
    Case("hsdp 2x1", "none", TRACED, 4, alike=QWEN2_5),
    Case("cp2 x tp2", "selective_op", alike=QWEN2_5),
    Case("pp2", "full", micro_batches=4, alike=QWEN2_5),
    Case("hsdp 2x1", micro_batches=4, alike=QWEN3),
    Case("pp2 x cp2", "full", micro_batches=4, alike=QWEN3),
    # Norms of heads, and what else has separate gradients under tensor parallel.
    Case(
        "tp2",
        "selective_op",
        TRACED,
        alike=family("qwen3", "model.norm=layernorm", "model.out_bias=true"),
    ),
    Case("hsdp 2x1", "selective_op", "compile", 4, alike=QWEN3_MOE),
    Case("pp2 x cp2", "full", micro_batches=4, alike=QWEN3_MOE),
    Case("dp2", "full", micro_batches=4, more=(EP2,), alike=QWEN3_MOE),
    Case("dp4", more=(EP4,), alike=QWEN3_MOE),
    Case("dp2", "none", TRACED, more=(EP2,), alike=QWEN3_MOE),
    Case("dp2", "full", TRACED, more=(EP2,), alike=QWEN3_MOE),
    Case("dp2", "selective_op", TRACED, more=(EP2, SAVE_EXPERTS), alike=QWEN3_MOE),
    Case("dp2", "selective_op", "compile", more=(EP2,), alike=QWEN3_MOE),
    Case("dp4", "selective_op", more=(EP2, SAVE_EXPERTS), alike=QWEN3_MOE),
    # Each expert is of one rank: FSDP gathers none.
    Case("dp2", "selective_op", more=(EP2,), alike=QWEN3_MOE),
    Case("hsdp 2x2", micro_batches=2, more=(EP2,), alike=QWEN3_MOE),
    Case("cp2", more=(EP2,), alike=QWEN3_MOE),
    Case("pp2 x dp2", "full", micro_batches=4, more=(EP2,), alike=QWEN3_MOE),
    Case(
        "pp2 x dp2",
        micro_batches=4,
        more=(EP2, schedule("ZBVZeroBubble")),
        alike=(*QWEN3_MOE, *FOUR_LAYERS),
    ),
    # Each rank routes its part of the sequence; experts are sharded, or shared, over these ranks.
    Case("tp2", alike=(*QWEN3_MOE, "training.steps=10")),
    Case("tp2", "full", TRACED, alike=QWEN3_MOE),
    Case("tp2", "selective_op", "compile", alike=QWEN3_MOE),
    Case("tp2", more=(EP2,), alike=(*QWEN3_MOE, "training.max_norm=0.2")),
    Case("dp2 x tp2", "selective_op", micro_batches=4, more=(EP4, SYNC_LAST), alike=QWEN3_MOE),
    Case("dp2 x tp2", micro_batches=2, more=(EP2,), alike=(*QWEN3_MOE, *MUON)),
    Case("hsdp 2x1 x tp2", micro_batches=4, more=(EP2,), alike=QWEN3_MOE),
    Case("hsdp 2x1", "selective_op", TRACED, 4, alike=(*MIXTRAL, *SEQUENCE_LOSS)),
    Case("pp2 x cp2", "full", micro_batches=4, alike=MIXTRAL),
    Case("dp2 x tp2", alike=(*MIXTRAL, *SEQUENCE_LOSS)),
    Case("dp2", "full", micro_batches=4, more=(EP2,), alike=DEEPSEEK),
    Case("hsdp 2x1", "selective_op", TRACED, 4, alike=DEEPSEEK),
    Case("pp2 x cp2", "full", micro_batches=4, alike=DEEPSEEK),
    # Latent vectors are whole on each rank, and the rotated part of keys is.
    Case("tp2", micro_batches=2, alike=(*DEEPSEEK, "training.steps=10")),
    Case("tp2", "full", TRACED, more=(EP2,), alike=DEEPSEEK),
    Case("pp2 x tp2", "full", micro_batches=4, more=(EP2,), alike=DEEPSEEK),
    Case(
        "pp2",
        "full",
        micro_batches=4,
        more=(schedule("InterleavedZeroBubble"),),
        alike=(*DEEPSEEK, *FOUR_LAYERS),
    ),
    Case("cp2", alike=DEEPSEEK_OVER_SEQUENCES),
    Case("cp2 x tp2", "full", micro_batches=2, more=(EP4,), alike=DEEPSEEK_OVER_SEQUENCES),
    Case("hsdp 2x1", "none", TRACED, 4, alike=GPT_NEOX),
    Case("pp2 x tp2", "selective_op", micro_batches=4, alike=GPT_NEOX),
    Case("cp2", "full", alike=GPT_NEOX),
    Case("hsdp 2x1", "none", TRACED, 4, alike=GPT),
    Case("tp2", more=(NO_SEQUENCE_PARALLEL,), alike=GPT),
    Case("cp2 x tp2", "selective_op", alike=GPT),
    Case("pp2", "full", micro_batches=4, alike=GPT),
    Case("hsdp 2x1", micro_batches=4, alike=MEGATRON_BERT),
    Case("dp2", micro_batches=4, alike=MEGATRON_BERT),
    Case("tp2", "full", more=(NO_SEQUENCE_PARALLEL,), alike=(*MEGATRON_BERT, *DROPOUT)),
    Case("tp2", "selective_op", TRACED, alike=(*MEGATRON_BERT, *DROPOUT)),
    Case("dp2 x tp2", micro_batches=2, alike=(*MEGATRON_BERT, *DROPOUT)),
    Case("pp2", "full", micro_batches=4, alike=(*MEGATRON_BERT, *DROPOUT)),
    Case("hsdp 2x1", "none", TRACED, 4, alike=BERT),
    Case("dp2 x tp2", "full", alike=BERT),
    Case("pp2", "selective_op", micro_batches=4, alike=BERT),
)

INT8, FLOAT8 = ("optimizer.state_dtype=int8",), ("optimizer.state_dtype=float8",)
BFLOAT16 = ("training.param_dtype=bfloat16",)
IN_PRECISION = (
    Case("dp2", micro_batches=4, alike=BFLOAT16),
    Case("hsdp 2x2", alike=BFLOAT16),
    Case("tp2", "full", alike=BFLOAT16),
    Case("dp2 x tp2", "selective_op", alike=BFLOAT16),
    Case("pp2", micro_batches=4, alike=BFLOAT16),
    Case("tp2", alike=(*BFLOAT16, "model.fp32_residual=true")),
    Case("dp2", alike=INT8),
    Case("hsdp 2x2", micro_batches=4, alike=INT8),
    Case("tp2", alike=INT8),
    Case("pp2", micro_batches=4, alike=INT8),
    Case("dp2", alike=FLOAT8),
    Case("tp2", alike=FLOAT8),
)


def _quick() -> frozenset[Case]:
    """The cases that show a mode, a layout's axis or a setting which no smaller case does."""
    seen: set[object] = set()
    quick = set()
    cases = (*CASES, *FURTHER, *FAMILIES, *IN_PRECISION)
    for case in sorted(cases, key=lambda case: (case.world_size, case.execution == "compile")):
        shown = {*LAYOUTS[case.layout][1], *case.more, *case.alike}
        shown |= {case.mode, case.execution, f"accumulates: {case.micro_batches > 1}"}
        if not shown <= seen:
            quick.add(case)
            seen |= shown
    return frozenset(quick)


QUICK = _quick()
"""Cases of the developer's run; the others are marked slow."""

TENSORWISE = ("float8.recipe=tensorwise", "float8.emulate=true")
GATHERED = (*TENSORWISE, "float8.fsdp_all_gather=true")
ASYNC_TP = "parallel.async_tp=true"
COMPILE = "compile.enable=true"
PP2_BATCH = (PP2, "training.global_batch_size=4")
MEMORY_BUDGET = "activation_checkpoint.mode=memory_budget"


@dataclass(frozen=True)
class Hole:
    """Settings that do not go together, on a CPU."""

    world_size: int
    settings: tuple[str, ...]


HOLES = (
    Hole(1, (MEMORY_BUDGET,)),
    Hole(2, (MEMORY_BUDGET, COMPILE, TP2)),
    Hole(8, ("parallel.reshard_after_forward=2", TP2)),
    Hole(8, ("parallel.tp=8",)),
    Hole(2, (ASYNC_TP, TP2)),
    Hole(2, (ASYNC_TP, COMPILE)),
    Hole(2, (ASYNC_TP, COMPILE, TP2, NO_SEQUENCE_PARALLEL)),
    Hole(2, (ASYNC_TP, COMPILE, TP2)),
    Hole(16, (CP4, TP4, ULYSSES)),
    Hole(2, (CP2, "model.name=megatron_bert")),
    Hole(2, (CP2, "model.name=bert")),
    Hole(2, (PP2, "training.global_batch_size=2", schedule("DualPipeV"))),
    Hole(2, (*PP2_BATCH, schedule("ZBVZeroBubble"), COMPILE)),
    Hole(2, (*PP2_BATCH, schedule("ZBVZeroBubble"), "activation_checkpoint.mode=selective_op")),
    Hole(2, (*PP2_BATCH, schedule("ZBVZeroBubble"), *TIED)),
    Hole(2, (TP2, NO_SEQUENCE_PARALLEL, "model.name=qwen3_moe")),
    Hole(1, ("training.reduce_dtype=float16",)),
    Hole(1, (*MUON, "training.param_dtype=float16")),
    Hole(1, ("float8.recipe=tensorwise",)),
    Hole(2, (*TENSORWISE, TP2)),
    Hole(4, (*GATHERED, "parallel.reshard_after_forward=2")),
    Hole(2, (*GATHERED, "parallel.cpu_offload=true")),
    Hole(2, ("float8.recipe=rowwise", *GATHERED[1:])),
    Hole(2, ("float8.recipe=rowwise_gw_hp", *GATHERED[1:])),
)

# Features with which every family must be trained, in any row.
FEATURES: dict[str, Callable[[Config, ParallelDims], bool]] = {
    "FSDP": lambda _, dims: dims.dp_shard * dims.cp > 1,
    "HSDP or DDP": lambda _, dims: dims.dp_replicate > 1,
    "TP, SP, loss parallel": lambda config, dims: (
        dims.tp > 1 and config.parallel.sequence_parallel and config.parallel.loss_parallel
    ),
    "CP": lambda _, dims: dims.cp > 1,
    "PP": lambda _, dims: dims.pp > 1,
    "full": lambda config, _: config.activation_checkpoint.mode == "full",
    "selective_op": lambda config, _: config.activation_checkpoint.mode == "selective_op",
    "compile": lambda config, _: config.compile.enable,
    # The micro-batches of a pipeline are another thing.
    "accumulation": lambda config, dims: (
        dims.pp == 1 and config.training.global_batch_size > _at_once(config, dims)
    ),
}


def _at_once(config: Config, dims: ParallelDims) -> int:
    """Samples of one micro-batch of every rank."""
    return config.training.local_batch_size * dims.batch


@cache
def features(world_size: int, settings: tuple[str, ...]) -> tuple[str, frozenset[str]]:
    """The family of a run, and which of FEATURES it has."""
    config = load_config(None, as_overrides(*EVERYWHERE, *settings)).config
    dims = ParallelDims.resolve(config.parallel, world_size)
    present = frozenset(name for name, has in FEATURES.items() if has(config, dims))
    return config.model.name, present
