"""Learning-rate schedules as functions of the step: nothing to save, nothing to resume."""

import math
from dataclasses import dataclass

from titan_lite.config.schema import LRScheduler


@dataclass(frozen=True)
class Schedule:
    """The learning rate of each step from 1 to total_steps; lr: the peak."""

    lr: float
    section: LRScheduler
    total_steps: int

    def __call__(self, step: int) -> float:
        return self.lr * lr_factor(step, self.section, self.total_steps)

    def changes(self, step: int) -> list[float]:
        """From each of the steps around this one to the next."""
        near = [s for s in range(step - 1, step + 3) if 1 <= s <= self.total_steps]
        return [self(s) - self(s - 1) for s in near[1:]]


def jump(before: Schedule, after: Schedule, step: int) -> tuple[float, float] | None:
    """The rates of `step` and the next one, where the schedule changes between them with a jump.

    A jump is larger than what either schedule does from one step to the next around there, or goes
    the other way by more than 1 %.
    """
    if not 1 <= step < after.total_steps:
        return None
    old, new = before(min(step, before.total_steps)), after(step + 1)
    change, usual = new - old, [0.0, *before.changes(step), *after.changes(step)]
    is_larger = abs(change) > max(map(abs, usual)) * (1 + 1e-9)
    is_other_way = not min(usual) <= change <= max(usual) and abs(change) > old / 100
    return (old, new) if is_larger or is_other_way else None


def lr_factor(step: int, section: LRScheduler, total_steps: int) -> float:
    """Factor of the peak learning rate that optimizer step `step` (1 to total_steps) uses.

    Linear warm-up reaches 1 at step warmup_steps; the decay reaches min_lr_factor at the last
    step. With decay_ratio < 1 a stable phase lies between them (warm-up / stable / decay,
    arXiv:2404.06395).
    """
    warmup = section.warmup_steps
    if step <= warmup:
        return step / warmup
    decay_steps = min(round(total_steps * section.decay_ratio), total_steps - warmup)
    decayed_steps = step - (total_steps - decay_steps)
    if section.decay_type == "constant" or decayed_steps <= 0:
        return 1.0
    progress = decayed_steps / decay_steps
    shape = {
        "linear": 1 - progress,
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "sqrt": 1 - math.sqrt(progress),
    }[section.decay_type]
    return section.min_lr_factor + (1 - section.min_lr_factor) * shape
