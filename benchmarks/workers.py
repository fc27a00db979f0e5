"""The processes of one measured variant, which join a process group as those of torchrun do."""

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch.distributed import TCPStore

from benchmarks.processes import Processes, serve
from titan_lite.config.load import ConfigError
from titan_lite.runtime.distributed import stop_process_group

# Imported once, in the fork server, instead of once in every process.
PRELOADED = ["titan_lite.training.open_run", "benchmarks.measure"]


class BenchmarkError(Exception):
    """An error that the user of a benchmark can fix; only its message is shown."""


class Group(Processes):
    """Processes with ranks; `call(function, *arguments)` calls it in each, returns results by rank.

    Rank and rendezvous are in the environment; the function, or its Trainer, creates the process
    group. Without OMP_NUM_THREADS the processes share the cores.
    """

    # A process that waits for others in a collective will not leave.
    seconds_to_leave = 5

    def __init__(self, nproc: int) -> None:
        on_gpu = torch.cuda.is_available()
        if on_gpu and nproc > (gpus := torch.cuda.device_count()):
            raise BenchmarkError(
                f"{nproc} processes need {nproc} GPUs, and there are {gpus}; "
                "with CUDA_VISIBLE_DEVICES= all is measured on the CPU"
            )
        # A process that is forked after a check for CUDA may not be able to use CUDA.
        context: Any = multiprocessing.get_context("spawn" if on_gpu else "forkserver")
        if not on_gpu:
            context.set_forkserver_preload(PRELOADED)
        self.threads = threads_of_each(nproc)
        # As torchrun's agent does: a port that the processes would open may be taken by then.
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        super().__init__(context, nproc, _serve, nproc, self.store.port, self.threads)

    def call(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Calls the function; BenchmarkError for a rejected configuration, else RuntimeError."""
        results: list[Any] = [None] * len(self.processes)
        for rank, outcome, value in self.outcomes(function, *arguments):
            if outcome == "rejected":
                raise BenchmarkError(value)
            if outcome == "failed":
                raise RuntimeError(f"process {rank}: {value}")
            if outcome == "died":
                raise RuntimeError(f"process {rank} ended with exit code {value}")
            results[rank] = value
        return results


def threads_of_each(nproc: int) -> int:
    """Returns the threads of a process: OMP_NUM_THREADS, else its share of the cores."""
    threads = os.environ.get("OMP_NUM_THREADS")
    return int(threads) if threads else max(1, (os.cpu_count() or 1) // nproc)


def _serve(rank: int, nproc: int, port: int, threads: int, connection: Connection) -> None:
    # Standard output is for the results alone.
    os.dup2(2, 1)
    torch.set_num_threads(threads)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(nproc),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
        TORCHELASTIC_RESTART_COUNT="0",
    )
    serve(connection, ConfigError)
    stop_process_group()
