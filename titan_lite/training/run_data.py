"""The data of one rank: its share of the samples, and the held-out documents."""

import itertools
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from titan_lite.checkpoint.state import Start
from titan_lite.config.problems import errors_for
from titan_lite.data.held_out import HeldOut, read_held_out
from titan_lite.data.loader import Batch, DataLoader, merge_states
from titan_lite.data.tokenizer import Tokenizer
from titan_lite.models.plan import Plan
from titan_lite.runtime.distributed import Process
from titan_lite.training.objective import OBJECTIVES


class RunData:
    """Data loader and held-out documents of one rank.

    Its `state_dict` merges the states of all ranks' loaders.
    """

    held_out: HeldOut | None = None
    batches: Iterator[Batch]

    def __init__(self, plan: Plan, process: Process, tokenizer: Tokenizer) -> None:
        self._config = plan.config
        with errors_for("data.tokenizer_path"):
            rows = OBJECTIVES[plan.family.objective](plan.config).row_maker(tokenizer)
        self._loader_args: dict[str, Any] = {
            "seq_len": plan.config.training.seq_len,
            "local_batch_size": plan.config.training.local_batch_size,
            "batch_rank": plan.dims.batch_rank(process.rank),
            "batch_degree": plan.dims.batch,
            "tokenizer": tokenizer,
            "rows": rows,
        }
        self.loader = self.build_loader()
        if plan.config.validation.enable:
            with errors_for("validation.dataset"):
                self.held_out = read_held_out(
                    plan.config.validation,
                    plan.config.data,
                    global_batch_size=plan.global_batch_size,
                    **self._loader_args,
                )

    def open(self, start: Start) -> None:
        """Moves the loader to the state of `start`, and reads the first batch."""
        if start.state.step > 0:
            with errors_for(start.key):
                self.loader.load_state_dict(start.state.parts["data"])
        # Unreadable documents end the run here, not in the first step.
        with errors_for("data.dataset"):
            batches = iter(self.loader)
            self.batches = itertools.chain([next(batches)], batches)

    def build_loader(self) -> DataLoader:
        """Returns a loader of this rank's share of the samples, positioned at the first sample."""
        return DataLoader(self._config.data, seed=self._config.training.seed, **self._loader_args)

    def close(self) -> None:
        """Stops the loader's worker."""
        self.loader.close()

    def state_dict(self) -> dict[str, Any]:
        """Returns the merged state of all ranks' loaders; collective."""
        states: list[dict[str, Any]] = [{}] * dist.get_world_size()
        dist.all_gather_object(states, self.loader.state_dict())
        return merge_states(states)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """No-op: `open` has already restored the state, before the first collective."""
