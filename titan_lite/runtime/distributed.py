"""The process group: device, backend, timeouts, shutdown."""

import contextlib
import os
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from titan_lite.config.schema import Comm

# Public from torch 2.14 on.
set_group_timeout = getattr(dist, "set_timeout", None) or distributed_c10d._set_pg_timeout

# Environment variables, each with its former name, and the values to set.
FLIGHT_RECORDER = {
    ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"): "2000",
    ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"): "{}/rank",
    ("TORCH_NCCL_DUMP_ON_TIMEOUT",): "1",
}

# Description of groups that serve a background thread, and have their own timeouts.
BACKGROUND = "background"


@dataclass(frozen=True)
class Process:
    """This process: global rank, rank on its node, number of processes, device."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @classmethod
    def from_environment(cls) -> "Process":
        """Reads the launcher's variables; without RANK there is only this process."""
        alone = "RANK" not in os.environ
        local_rank = 0 if alone else int(os.environ["LOCAL_RANK"])
        device = torch.device("cuda", local_rank) if torch.cuda.is_available() else "cpu"
        return cls(
            rank=0 if alone else int(os.environ["RANK"]),
            local_rank=local_rank,
            world_size=1 if alone else int(os.environ["WORLD_SIZE"]),
            device=torch.device(device),
        )


def start_process_group(process: Process, comm: Comm) -> None:
    """Joins the process group: NCCL (with gloo for host tensors) on GPUs, gloo on CPU."""
    if dist.is_initialized():
        return
    on_gpu = process.device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(process.device)
    timeout = timedelta(seconds=comm.init_timeout_seconds)
    is_on_one_node = "RANK" not in os.environ or os.environ.get("GROUP_WORLD_SIZE") == "1"
    if is_on_one_node and "GLOO_SOCKET_IFNAME" not in os.environ:
        # Otherwise gloo looks up the machine's own name, which may not resolve until a timeout.
        os.environ["GLOO_SOCKET_IFNAME"] = loopback_interface()
    # A process that no launcher started has no rendezvous: an in-memory store serves it.
    store: dist.Store = dist.HashStore()
    if "RANK" in os.environ:
        store, _, _ = next(iter(dist.rendezvous("env://", timeout=timeout)))
        store.set_timeout(timeout)
        if os.environ.get("GROUP_WORLD_SIZE") == "1" and (
            restart := os.environ.get("TORCHELASTIC_RESTART_COUNT")
        ):
            # torchrun keeps its store when it restarts processes, and the store still has the
            # addresses of the former ones. With several nodes, each counts restarts separately, so
            # TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 must be set to get a new store.
            store = dist.PrefixStore(restart, store)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        timeout=timeout,
        store=store,
        rank=process.rank,
        world_size=process.world_size,
        device_id=process.device if on_gpu else None,
    )


def loopback_interface() -> str:
    """Name of the loopback interface."""
    return "lo0" if sys.platform == "darwin" else "lo"


def clone_store() -> dist.Store:
    """Returns another connection to the process group's store, for a thread."""
    return distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]


def enable_flight_recorder(folder: Path) -> str:
    """Makes NCCL write each rank's last collectives below `folder` when one times out.

    Must be called before the process group is created. Variables that are already set in the
    environment keep their values. Returns a sentence that names the files.
    """
    path = folder.absolute() / "flight_recorder"
    path.mkdir(parents=True, exist_ok=True)
    for names, value in FLIGHT_RECORDER.items():
        if not any(name in os.environ for name in names):
            os.environ[names[0]] = value.format(path)
    new, old = "TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"
    file = os.environ.get(new) or os.environ[old]
    return (
        f"When NCCL times out, each rank writes its last collectives to {file}RANK: "
        f"torchfrtrace {Path(file).parent} compares them"
    )


def check_dtype(name: str, device: torch.device) -> None:
    """Raises ValueError if the device does not support this dtype."""
    if name != "bfloat16" or device.type != "cuda":
        return
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError(
            f'{torch.cuda.get_device_name(device)} does not support bfloat16; use "float16" (with '
            'loss scaling) or "float32"'
        )


def is_emulated(name: str, device: torch.device) -> bool:
    """Returns True if torch has no matmul kernels of this dtype for this processor.

    Matmuls are then much slower than in float32: 1/40 of the speed on a CPU without AVX-512.
    """
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if name == "bfloat16":
        return not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return name == "float16" and not torch.ops.mkldnn._is_mkldnn_fp16_supported()


def set_timeout(seconds: int) -> None:
    """Sets the timeout of every process group that training waits for.

    Starts with a barrier, so that no rank is still in a collective with the former timeout.
    """
    dist.barrier()
    for group in list(distributed_c10d._world.pg_map):
        if group.group_desc == BACKGROUND:
            continue
        set_group_timeout(timedelta(seconds=seconds), group)


def all_reduce(tensor: Tensor, operation: str) -> Tensor:
    """Reduces a tensor over all ranks, in place, with the named operation ("max")."""
    dist.all_reduce(tensor, op=getattr(dist.ReduceOp, operation.upper()))
    return tensor


def stop_process_group() -> None:
    """Leaves the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def exit_immediately(code: int) -> None:
    """Ends a process that has a launcher; the reason has been logged.

    Skips all cleanup (process groups, threads that write), which could block: the launcher only
    ends the other ranks, which may wait for this one, after it has ended.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)
