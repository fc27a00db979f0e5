"""Learning-rate schedules as functions of the step, without state to save."""

import math
from dataclasses import dataclass

from titan_lite.config.schema import LRScheduler


@dataclass(frozen=True)
class LRSchedule:
    """The learning rate of each step from 1 to total_steps. lr: its peak."""

    lr: float
    section: LRScheduler
    total_steps: int

    def __call__(self, step: int) -> float:
        return self.lr * lr_factor(step, self.section, self.total_steps)

    def changes(self, step: int) -> list[float]:
        """Returns the changes of the rate from step to step, around this one."""
        near = [s for s in range(step - 1, step + 3) if 1 <= s <= self.total_steps]
        return [self(s) - self(s - 1) for s in near[1:]]


def jump(before: LRSchedule, after: LRSchedule, step: int) -> tuple[float, float] | None:
    """Returns the rates of `step` and the next one if the change of schedules makes a jump.

    A jump is larger than either schedule's changes from step to step around `step`, or more than
    1 % in the opposite direction.
    """
    if not 1 <= step < after.total_steps:
        return None
    old, new = before(min(step, before.total_steps)), after(step + 1)
    change, usual = new - old, [0.0, *before.changes(step), *after.changes(step)]
    is_larger = abs(change) > max(map(abs, usual)) * (1 + 1e-9)
    is_other_way = not min(usual) <= change <= max(usual) and abs(change) > old / 100
    return (old, new) if is_larger or is_other_way else None


def lr_factor(step: int, section: LRScheduler, total_steps: int) -> float:
    """Returns the factor of the peak learning rate for step `step` (1 to total_steps).

    A linear warm-up reaches 1 at step warmup_steps. A stable phase may follow before the decay
    (arXiv:2404.06395). The second warm-up, if set, multiplies the result.
    """
    factor = _first_factor(step, section, total_steps)
    after = step - section.rewarmup_start
    return factor * after / section.rewarmup_steps if 0 < after < section.rewarmup_steps else factor


def decay_span(section: LRScheduler, total_steps: int) -> tuple[int, int]:
    """Returns the last step at the peak, and the first one at the floor."""
    warmup, start = section.warmup_steps, section.decay_start
    if section.decay_steps == -1 and start == -1:
        steps = min(round(total_steps * section.decay_ratio), total_steps - warmup)
        return total_steps - steps, total_steps
    if start == -1:
        start = max(total_steps - section.decay_steps, warmup)
    end = total_steps if section.decay_steps == -1 else start + section.decay_steps
    return start, end


def _first_factor(step: int, section: LRScheduler, total_steps: int) -> float:
    if step <= section.warmup_steps:
        return step / section.warmup_steps
    start, end = decay_span(section, total_steps)
    if section.decay_type == "constant" or step <= start:
        return 1.0
    if section.decay_type == "inverse_sqrt":
        return max(math.sqrt(max(start, 1) / step), section.min_lr_factor)
    progress = min((step - start) / (end - start), 1.0)
    shape = {
        "linear": 1 - progress,
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "sqrt": 1 - math.sqrt(progress),
    }[section.decay_type]
    return section.min_lr_factor + (1 - section.min_lr_factor) * shape
