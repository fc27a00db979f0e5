"""Intervals around a predicted step time that contain 80 % and 90 % of measured ones."""

import math
from dataclasses import dataclass

from titan_lite.models.args import MoEArgs
from titan_lite.planner.cluster import VALIDATED
from titan_lite.planner.step_time import Step

# Bounds of measured / predicted step time: on devices and stacks that published runs validate
# (predictions are optimistic), on these once calibrated, and on others.
KNOWN, CALIBRATED, UNKNOWN = (0.93, 1.12), (0.94, 1.06), (0.93, 1.60)
# Sizes of the largest validated jobs. The interval widens beyond four times these.
MAX_GPUS, MAX_TOKENS = 512, 65_536


@dataclass(frozen=True)
class Interval:
    """80 % interval of a step's seconds. notes: reasons why it is wider than usual."""

    low: float
    high: float
    notes: tuple[str, ...]


def interval(step: Step) -> Interval:
    """The interval around a predicted step."""
    job, cluster, notes = step.job, step.cluster, []
    low, high = CALIBRATED if cluster.calibrated else KNOWN
    if cluster.device.architecture not in VALIDATED:
        low, high = UNKNOWN
        remedy = "" if cluster.calibrated else "; run titan-lite plan calibrate on it"
        notes.append(f"the planner was not validated on {cluster.device.name}{remedy}")
    elif isinstance(job.args, MoEArgs):
        low, high = UNKNOWN
        notes.append("the planner was not validated on a Mixture of Experts")
    elif not cluster.calibrated and job.kernels in ("native", "fused"):
        low, high = UNKNOWN
        # This library's without compile; "fused" is only in published rows.
        notes.append("the planner was not validated on eager kernels")
    beyond = math.log2(max(1, job.world_size / (4 * MAX_GPUS), job.span / (4 * MAX_TOKENS)))
    if beyond:
        notes.append("more GPUs or longer sequences than validated")
    widening = 1.1**beyond
    return Interval(step.seconds * low / widening, step.seconds * high * widening, tuple(notes))
