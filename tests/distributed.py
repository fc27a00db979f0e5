"""Several gloo processes that stay alive for a whole test session and run many cases each."""

import multiprocessing
import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

# Imported once, in the fork server, instead of once in every worker.
PRELOADED = [
    "tests.distributed",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint.state_dict",
    "titan_lite.trainer",
]


def _serve(rank: int, world_size: int, store: str, connection: Connection) -> None:
    import torch
    import torch.distributed as dist

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=60),
    )
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        try:
            connection.send((function(*arguments), None))
        except Exception:
            connection.send((None, traceback.format_exc()))


class Workers:
    """`run(function, *arguments)` calls it in every process and returns the results by rank."""

    def __init__(self, world_size: int, folder: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self.connections: list[Connection] = []
        self.processes = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(rank, world_size, str(folder / "store"), theirs),
                daemon=True,
            )
            process.start()
            theirs.close()
            self.connections.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any, timeout: float = 120) -> list[Any]:
        for connection in self.connections:
            connection.send((function, arguments))
        results: list[Any] = [None] * len(self.connections)
        waiting = dict(zip(self.connections, range(len(self.connections)), strict=True))
        failures = []
        while waiting:
            ready = wait(list(waiting), timeout=timeout)
            if not ready:
                self.close()
                failures.append(f"ranks {sorted(waiting.values())} did not answer in {timeout} s")
                break
            for connection in ready:
                rank = waiting.pop(connection)
                try:
                    results[rank], failure = connection.recv()
                except EOFError:
                    failure = f"the process died with {self.processes[rank].exitcode}"
                if failure:
                    failures.append(f"rank {rank}: {failure}")
                    # The others may wait for this one until their own timeout.
                    timeout = min(timeout, 10)
        assert not failures, "\n".join(failures)
        return results

    def close(self) -> None:
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            process.kill()
            process.join()


class WorkersBySize(dict[int, Workers]):
    """Workers by world size, started when first asked for."""

    def __init__(self, folders: Any) -> None:
        super().__init__()
        self.folders = folders

    def __missing__(self, world_size: int) -> Workers:
        self[world_size] = Workers(world_size, self.folders.mktemp(f"workers{world_size}"))
        return self[world_size]

    def __enter__(self) -> "WorkersBySize":
        return self

    def __exit__(self, *_: object) -> None:
        for workers in self.values():
            workers.close()
