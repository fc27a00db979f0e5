"""The processes of one measured variant, which join a process group as those of torchrun do."""

import multiprocessing
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from torch.distributed import TCPStore

from titan_lite.config.load import ConfigError
from titan_lite.runtime.distributed import stop_process_group

# Imported once, in the fork server, instead of once in every process.
PRELOADED = ["titan_lite.training.open_run", "benchmarks.measure"]

# A process that waits for others in a collective will not leave.
SECONDS_TO_LEAVE = 5


class BenchmarkError(Exception):
    """An error that the user of a benchmark can fix; only its message is shown."""


class Group:
    """Processes with ranks; `call(function, *arguments)` calls it in each, returns results by rank.

    Rank and rendezvous are in the environment; the function, or its Trainer, creates the process
    group. Without OMP_NUM_THREADS the processes share the cores.
    """

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
        self.connections: list[Connection] = []
        self.processes = []
        # As torchrun's agent does: a port that the processes would open may be taken by then.
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for rank in range(nproc):
            local, peer = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(rank, nproc, self.store.port, self.threads, peer),
                daemon=True,
            )
            process.start()
            peer.close()
            self.connections.append(local)
            self.processes.append(process)

    def call(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Calls the function; BenchmarkError for a rejected configuration, else RuntimeError."""
        for connection in self.connections:
            connection.send((function, arguments))
        results: list[Any] = [None] * len(self.connections)
        waiting: dict[Any, int] = {c: rank for rank, c in enumerate(self.connections)}
        while waiting:
            for ready in wait(list(waiting)):
                rank = waiting.pop(ready)
                results[rank] = self._answer(rank)
        return results

    def _answer(self, rank: int) -> Any:
        try:
            outcome, result = self.connections[rank].recv()
        except EOFError:
            self.processes[rank].join()
            code = self.processes[rank].exitcode
            raise RuntimeError(f"process {rank} ended with exit code {code}") from None
        if outcome == "refused":
            raise BenchmarkError(result)
        if outcome == "failed":
            raise RuntimeError(f"process {rank}: {result}")
        return result

    def __enter__(self) -> "Group":
        return self

    def __exit__(self, *_: object) -> None:
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            process.join(timeout=SECONDS_TO_LEAVE)
            process.kill()
            process.join()


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
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return stop_process_group()
        try:
            connection.send(("done", function(*arguments)))
        except ConfigError as error:
            connection.send(("refused", str(error)))
        except Exception:
            connection.send(("failed", traceback.format_exc()))
