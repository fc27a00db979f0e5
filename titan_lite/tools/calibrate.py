"""titan-lite plan calibrate: measures the planner's constants on this machine's devices.

Each constant is chosen so that the planner's own formula gives the measured time.
"""

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from titan_lite.config.arguments import UsageError
from titan_lite.config.schema import Comm
from titan_lite.planner.cluster import Cluster
from titan_lite.runtime.distributed import (
    Process,
    start_process_group,
    stop_process_group,
)
from titan_lite.runtime.gpus import count_gpus
from titan_lite.tools.calibrate_fit import MEASURED, describe_machine, explain, fit
from titan_lite.tools.calibrate_measure import (
    Kernels,
    Machine,
    Seconds,
    exchanges,
    overlaps,
    tensor_parallel,
)


def calibrate(process: Process, per_node: int, budget: float) -> tuple[Cluster, Seconds, Seconds]:
    """Returns the cluster, the measured and the predicted seconds. All ranks must call it."""
    machine = Machine(process, per_node, budget)
    kernels = Kernels(machine)
    seconds = machine.measure(kernels.cases(), 0.6)
    if process.world_size > 1:
        seconds |= machine.measure(exchanges(machine), 0.2)
        seconds |= machine.measure(overlaps(machine, kernels, seconds), 0.1)
    if machine.tp > 1:
        seconds |= machine.measure(tensor_parallel(machine, kernels), 0.1)
    cluster = fit(describe_machine(machine, seconds), machine, seconds)
    return cluster, seconds, explain(cluster, machine)


def to_toml(cluster: Cluster, source: str, price: float) -> str:
    """Formats the cluster's file."""
    device, table = cluster.device.name, {}
    if cluster.device.source == MEASURED:
        facts = dataclasses.asdict(cluster.device)
        table = {key: value for key, value in facts.items() if key != "names" and value is not None}
    rows: dict[str, Any] = {
        **({} if table else {"device": device}),
        "gpus_per_node": cluster.gpus_per_node,
        "node_nic_gbs": cluster.node_nic_gbs,
        "price_per_gpu_hour": price,
        "pue": 1.0,
        "host_watts": 0,
        "calibrated": True,
        "source": source,
    }
    lines = ["# Please set price_per_gpu_hour, pue (power usage effectiveness) and host_watts."]
    if "nic" not in cluster.measured:
        lines.append("# Not measured: node_nic_gbs, GB/s of a node's network in one direction.")
    for name, values in (("", rows), ("device", table), ("measured", cluster.measured)):
        lines += ["", f"[{name}]"] if name and values else []
        lines += [f"{_key(key)} = {json.dumps(value)}" for key, value in values.items()]
    return "\n".join(lines) + "\n"


def _key(name: str) -> str:
    return json.dumps(name) if "/" in name else name


def report(cluster: Cluster, measured: Seconds, explained: Seconds) -> str:
    """Formats the constants next to those that they replace, and measured and predicted times."""
    lines = [f"{'constant':<28}{'measured':>12}{'before':>12}"]
    known = cluster.values
    lines += [
        f"{name:<28}{value:>12.4g}{known.get(name, math.nan):>12.4g}"
        for name, value in cluster.measured.items()
    ]
    lines += ["", f"{'kernel':<52}{'measured':>12}{'predicted':>12}"]
    lines += [
        f"{name:<52}{1e3 * measured[name]:>9.3f} ms{1e3 * explained[name]:>9.3f} ms"
        for name in explained
    ]
    return "\n".join(lines)


def check_writable(path: Path) -> None:
    """Raises UsageError unless the file can be written, so that no measurement is lost."""
    is_new = not path.exists()
    try:
        path.open("a", encoding="utf-8").close()
    except OSError as error:
        raise UsageError(f"--output {path} cannot be written: {error.strerror}") from error
    if is_new:
        path.unlink()


def main(output: str, processes: int | None, budget: float, price: float) -> None:
    """Measures in new processes, or in this one if a launcher such as torchrun started it."""
    if not output.endswith(".toml") or not Path(output).absolute().parent.is_dir():
        raise UsageError(f"--output must be a .toml file in a folder that exists, got {output!r}")
    if os.environ.get("RANK", "0") == "0":
        check_writable(Path(output))
    options = output, budget, price
    if "RANK" in os.environ:
        _calibrate(*options, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        return
    gpus = count_gpus()
    processes = gpus or 2 if processes is None else processes
    if processes < 1 or 0 < gpus < processes:
        needed = f"from 1 to {gpus}, the GPUs of this machine" if gpus else "at least 1"
        raise UsageError(f"--processes must be {needed}, got {processes}")
    threads = int(os.environ.get("OMP_NUM_THREADS", max(1, (os.cpu_count() or 1) // processes)))
    # This process opens the store: a port chosen now could be taken before another opens it.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    arguments = processes, store.port, threads, options
    torch.multiprocessing.spawn(_member, arguments, nprocs=processes)


def _member(
    rank: int, processes: int, port: int, threads: int, options: tuple[str, float, float]
) -> None:
    torch.set_num_threads(threads)
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in variables.items()})
    os.environ.update(
        MASTER_ADDR="127.0.0.1", TORCHELASTIC_USE_AGENT_STORE="True", GROUP_WORLD_SIZE="1"
    )
    _calibrate(*options, processes)


def _calibrate(output: str, budget: float, price: float, per_node: int) -> None:
    process = Process.from_environment()
    start_process_group(process, Comm())
    cluster, measured, explained = calibrate(process, per_node, budget)
    if process.rank == 0:
        source = (
            f"titan-lite plan calibrate, torch {torch.__version__}, {process.world_size} processes"
        )
        Path(output).write_text(to_toml(cluster, source, price), encoding="utf-8")
        print(report(cluster, measured, explained))
        print(f"Written to {output}: titan-lite plan CONFIG --cluster {output}")
    stop_process_group()
