"""Pipeline schedules as data, which the code for stages, the rules and the planner read."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from titan_lite.config.registry import Registry

TORCH = "torch.distributed.pipelining.schedules"


@dataclass(frozen=True, kw_only=True)
class PipelineSchedule:
    """A pipeline schedule: an order in which ranks compute micro-batches."""

    build: str
    """"module:class" with the interface of the schedules in torch.distributed.pipelining."""
    stages_per_rank: int | None = 1
    """Stages of each rank; None: parallel.pp_stages_per_rank."""
    is_v: bool = False
    """True: the first rank has the first and the last stage, and so on inwards. False: rank r has
    stages r, r + pp, ..."""
    splits_backward: bool = False
    """The gradients of a stage's inputs are computed before those of its weights."""
    min_per_rank: int = 0
    """Smallest number of micro-batches per pipeline rank; 0: one micro-batch is enough."""
    multiple_of_ranks: bool = False
    """The number of micro-batches must be a multiple of the ranks."""


SCHEDULES: Registry[PipelineSchedule] = Registry(
    "pipeline schedule",
    {
        "GPipe": PipelineSchedule(build=f"{TORCH}:ScheduleGPipe"),
        "1F1B": PipelineSchedule(build=f"{TORCH}:Schedule1F1B", min_per_rank=1),
        "Interleaved1F1B": PipelineSchedule(
            build=f"{TORCH}:ScheduleInterleaved1F1B", stages_per_rank=None, multiple_of_ranks=True
        ),
        "LoopedBFS": PipelineSchedule(build=f"{TORCH}:ScheduleLoopedBFS", stages_per_rank=None),
        "InterleavedZeroBubble": PipelineSchedule(
            build=f"{TORCH}:ScheduleInterleavedZeroBubble",
            stages_per_rank=None,
            multiple_of_ranks=True,
            splits_backward=True,
        ),
        "ZBVZeroBubble": PipelineSchedule(
            build=f"{TORCH}:ScheduleZBVZeroBubble",
            stages_per_rank=2,
            is_v=True,
            splits_backward=True,
        ),
        "DualPipeV": PipelineSchedule(
            build=f"{TORCH}:ScheduleDualPipeV",
            stages_per_rank=2,
            is_v=True,
            splits_backward=True,
            min_per_rank=2,
        ),
    },
)


class Looped(Collection[str]):
    """Names of the schedules with a configurable number of stages per rank, including plugins'."""

    def __contains__(self, name: object) -> bool:
        """Returns whether it is one of them."""
        return name in list(self)

    def __iter__(self) -> Iterator[str]:
        """Their names."""
        return (name for name, row in SCHEDULES.items() if row.stages_per_rank is None)

    def __len__(self) -> int:
        """Their number."""
        return len(list(iter(self)))
