"""A training job as the numbers that decide its time and memory, for any library."""

from dataclasses import dataclass
from typing import Literal

from titan_lite.config.activation_checkpoint import SelectiveOp
from titan_lite.config.dims import ParallelDims
from titan_lite.models.args import DecoderArgs

Sharding = Literal["fsdp", "ddp", "zero1", "zero2", "hybrid_zero", "greedy_zero1"]
Recompute = Literal["none", "full", "selective_op", "attention_core", "norms"]


@dataclass(frozen=True, kw_only=True)
class Job(ParallelDims):
    """One optimizer step of a run on a mesh, and the software stack that runs it.

    span: tokens that a token can attend to, before the causal mask.
    micro_steps: micro-batches of a step. pipelined: those of one pass of a pipeline.
    cp_balanced: each rank has a part from the start and one from the end of a causal sequence.
    blocks: number of blocks of each pipeline stage. recomputed: how many of these are checkpointed.
    sharding: what is split over the `fsdp` ranks: parameters, or only the optimizer's state.
    keeps_gathered: parameters stay gathered between forward and backward.
    syncs_last: gradients are reduced after the last micro-batch only.
    saved: operations whose results "selective_op" keeps, as in activation_checkpoint.save.
    width: bytes of an activation's element. moment_bytes: bytes of an element of an AdamW moment.
    accumulate_bytes, optimizer_bytes, loss_bytes: memory traffic of adding up gradients and of the
    optimizer, per parameter, and of the cross-entropy, per logit.
    ema: an average of the weights is stored.
    ns_steps: Newton-Schulz iterations of Muon; 0 if AdamW has all parameters.
    kernels: class of the element-wise kernels, in constants.KERNELS.
    stack: the library's name in planner_constants.toml; "" for this one.
    """

    args: DecoderArgs
    seq_len: int
    span: int
    micro_batch: int
    micro_steps: int = 1
    cp_method: str = "ring"
    cp_balanced: bool = True
    blocks: tuple[int, ...] = ()
    stages_per_rank: int = 1
    schedule: str = "1F1B"
    pipelined: int = 1
    sharding: Sharding = "fsdp"
    keeps_gathered: bool = False
    syncs_last: bool = False
    sequence_parallel: bool = True
    loss_parallel: bool = True
    async_tp: bool = False
    recompute: Recompute = "none"
    recomputed: tuple[int, ...] = (0,)
    saved: tuple[str, ...] = tuple(SelectiveOp().save)
    early_stop: bool = True
    float8: str = "none"
    float8_gather: bool = False
    width: int = 2
    reduce_bytes: int = 4
    accumulate_bytes: int = 10
    moment_bytes: float = 4
    rounding_bytes: int = 0
    ema: bool = False
    ns_steps: int = 0
    kernels: str = "fused"
    attention: str = "flash"
    loss_bytes: int = 28
    loss_chunks: int | None = None
    head_token_fraction: float = 1.0
    stack: str = ""

    @property
    def tokens(self) -> int:
        """Tokens of a step, over all ranks."""
        return self.micro_batch * self.micro_steps * self.seq_len * self.batch

    @property
    def local_tokens(self) -> int:
        """Tokens of a micro-batch on a rank."""
        return self.micro_batch * self.seq_len // self.cp
