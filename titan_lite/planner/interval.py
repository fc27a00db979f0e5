"""How far a measured step may be from the predicted one, in 80 and 90 % of the cases."""

import math
from dataclasses import dataclass

from titan_lite.models.args import MoEArgs
from titan_lite.planner.cluster import VALIDATED
from titan_lite.planner.step_time import Step

# Measured over predicted step time: of published runs on known stacks (predictions are optimistic),
# on such machines once calibrated, and on stacks or devices that nothing validates.
KNOWN, CALIBRATED, UNKNOWN = (0.93, 1.12), (0.94, 1.06), (0.93, 1.60)
# 90 % intervals are wider by this.
WIDER = 1.5
# The largest validated jobs: beyond four times these the interval widens.
MAX_GPUS, MAX_TOKENS = 512, 65_536
STACKS = ("apex", "compile", "eager", "torch", "amp")


@dataclass(frozen=True)
class Interval:
    """Seconds that 80 % of the steps lie within; notes: why they are wider than of known stacks."""

    low: float
    high: float
    notes: tuple[str, ...]

    def wider(self, seconds: float) -> tuple[float, float]:
        """The same for 90 %."""
        return seconds - WIDER * (seconds - self.low), seconds + WIDER * (self.high - seconds)


def interval(step: Step) -> Interval:
    """The interval around a predicted step."""
    job, cluster, notes = step.job, step.cluster, []
    low, high = CALIBRATED if cluster.calibrated else KNOWN
    if cluster.device.architecture not in VALIDATED:
        low, high = UNKNOWN
        remedy = "" if cluster.calibrated else ": calibrate it"
        notes.append(f"no run on {cluster.device.name} validates the model{remedy}")
    elif isinstance(job.args, MoEArgs):
        low, high = UNKNOWN
        notes.append("no run of a Mixture of Experts validates the model")
    elif not cluster.calibrated and job.kernels not in STACKS:
        low, high = UNKNOWN
        notes.append(f'no run with kernels of class "{job.kernels}" validates the model')
    beyond = math.log2(max(1, job.world_size / (4 * MAX_GPUS), job.span / (4 * MAX_TOKENS)))
    if beyond:
        notes.append("more GPUs or longer sequences than validated")
    widening = 1.1**beyond
    return Interval(step.seconds * low / widening, step.seconds * high * widening, tuple(notes))
