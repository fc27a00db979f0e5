"""Several processes that stay alive for a whole test session and run many cases each.

They talk over gloo, on the CPU, with GPUs hidden from them; or over NCCL, each on a separate GPU.
"""

import gc
import multiprocessing
import os
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.processes import Processes, serve

# Seconds after which something hangs. A guard, and no bound: many times what a busy machine needs,
# with every process compiling into a cold cache.
GUARD = 900
# Imported once, in the fork server, instead of once in every worker.
PRELOADED = [
    "tests.distributed",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint.state_dict",
    "titan_lite.training.open_run",
    "torch._inductor.compile_fx",
]


def _share_gloo_device() -> None:
    """Lets all gloo groups of this process use one device.

    A device has a thread that wakes up 100 times a second as long as the process lives, and each
    group would get its own: with those of the matrix's layouts, an idle process took 8 % of a core.
    """
    from torch.distributed import ProcessGroupGloo

    device = ProcessGroupGloo.create_default_device()
    make = ProcessGroupGloo.__init__

    def make_with_device(
        self: Any, store: Any, rank: int, size: int, timeout: timedelta, **_: Any
    ) -> None:
        options = ProcessGroupGloo._Options()
        options._devices, options._threads, options._timeout = [device], 2, timeout
        make(self, store, rank, size, options)

    ProcessGroupGloo.__init__ = make_with_device


def _serve(
    rank: int, world_size: int, device_type: str, shares: bool, store: str, connection: Connection
) -> None:
    import torch
    import torch.distributed as dist

    from titan_lite.training import setup

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    on_gpu = device_type == "cuda"
    if on_gpu:
        torch.cuda.set_device(rank)
        # torch's default, which comparisons in float32 rely on: TF32 keeps 10 bits of a factor.
        torch.set_float32_matmul_precision("highest")
    else:
        # Before the first call of CUDA, or it would have no effect.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if shares:
        _share_gloo_device()
        # One set of groups per layout, not per run: each has threads as long as the process lives.
        setup.build_meshes = cache(setup.build_meshes)
    # Collections, of which every run makes some, need not look at what was imported.
    gc.freeze()
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=GUARD),
        device_id=torch.device("cuda", rank) if on_gpu else None,
    )
    serve(connection)


class Workers(Processes):
    """`run(function, *arguments)` calls it in every process and returns the results by rank.

    shares: runs share groups and gloo's device, as those of a launcher do not.
    """

    def __init__(
        self, world_size: int, folder: Path, device_type: str = "cpu", *, shares: bool = True
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        store = str(folder / "store")
        super().__init__(context, world_size, _serve, world_size, device_type, shares, store)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        results: list[Any] = [None] * len(self.processes)
        failures = []
        try:
            for rank, outcome, value in self.outcomes(function, *arguments, timeout=GUARD):
                if outcome == "done":
                    results[rank] = value
                else:
                    failure = f"the process died with {value}" if outcome == "died" else value
                    failures.append(f"rank {rank}: {failure}")
        except TimeoutError as error:
            self.close()
            failures.append(str(error))
        assert not failures, "\n".join(failures)
        return results


class WorkersBySize(dict[int, Workers]):
    """Workers by world size, started on first use."""

    def __init__(self, folders: Any, device_type: str = "cpu") -> None:
        super().__init__()
        self.folders = folders
        self.device_type = device_type

    def __getitem__(self, world_size: int) -> Workers:
        if world_size in self and self.get(world_size).is_closed:
            del self[world_size]
        return super().__getitem__(world_size)

    def __missing__(self, world_size: int) -> Workers:
        folder = self.folders.mktemp(f"workers{world_size}")
        self[world_size] = Workers(world_size, folder, self.device_type)
        return self[world_size]

    def __enter__(self) -> "WorkersBySize":
        return self

    def __exit__(self, *_: object) -> None:
        for workers in self.values():
            workers.close()
