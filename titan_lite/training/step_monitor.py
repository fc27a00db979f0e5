"""How steps came out, read from the device after the fact, and what follows from it."""

import logging
from collections import deque
from collections.abc import Sequence

import torch
import torch.distributed as dist

from titan_lite.optim.guard import Guard
from titan_lite.optim.nonfinite import NonFiniteError
from titan_lite.parallel.init_weights import CHECKPOINT_PREFIX
from titan_lite.runtime.readback import Readback
from titan_lite.training.step import StepResult

logger = logging.getLogger(__name__)


class Outcomes:
    """Steps that the host has not looked at yet; `is_stopping` once a rank was asked to stop.

    All ranks read after the same steps, so that they do the same about what they find.
    """

    def __init__(self, guard: Guard, parameter_names: Sequence[str]) -> None:
        """parameter_names: of the whole model, in its order."""
        self.is_stopping = False
        self._guard = guard
        self._parameter_names = parameter_names
        self._unread: deque[tuple[int, Readback]] = deque()

    def add(self, step: int, result: StepResult) -> None:
        """Has a step's outcome sent to the host."""
        outcome = (result.is_finite, result.num_stopping, result.loss, result.grad_norm)
        numbers = [number.to(result.loss.device, torch.float32) for number in outcome]
        self._unread.append((step, Readback(torch.stack(numbers))))

    def read(self, keep: int = 0) -> None:
        """Looks at all but the last `keep` steps; NonFiniteError where one ends the run."""
        while len(self._unread) > keep:
            step, readback = self._unread.popleft()
            is_finite, num_stopping, loss, grad_norm = readback.read()
            self.is_stopping |= num_stopping > 0
            if is_finite or self._guard.mode == "rescale":
                continue
            numbers = f"the loss of step {step} is {loss:g}, its gradient norm {grad_norm:g}"
            if self._guard.mode == "stop":
                raise NonFiniteError(f"{numbers}. {self._blame()}")
            if dist.get_rank() == 0:
                logger.warning("Skipped: %s", numbers)

    def _blame(self) -> str:
        """Names the parameters with non-finite gradients, in a sentence; collective."""
        mine = {name.replace(CHECKPOINT_PREFIX, "") for name in self._guard.bad_gradients()}
        by_rank: list[set[str]] = [set()] * dist.get_world_size()
        dist.all_gather_object(by_rank, mine)
        bad = [name for name in self._parameter_names if any(name in names for names in by_rank)]
        if not bad:
            return "All gradients are finite; the step was not applied"
        places = [
            f"{name} (on rank {next(r for r, names in enumerate(by_rank) if name in names)})"
            for name in dict.fromkeys((bad[0], bad[-1]))
        ]
        return (
            f"Not finite are the gradients of {len(bad)} of {len(self._parameter_names)} "
            f"parameters: {' to, the first in backward, '.join(places)}; the step was not applied"
        )
