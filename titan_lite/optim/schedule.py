"""Learning-rate schedules as functions of the step: nothing to save, nothing to resume."""

import math

from titan_lite.config.schema import LRScheduler


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
