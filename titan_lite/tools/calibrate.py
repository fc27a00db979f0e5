"""titan-lite plan calibrate: measures the planner's constants on this machine's devices.

Each constant is chosen so that the planner's own formula gives the measured time.
"""

import dataclasses
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from titan_lite.config.arguments import UsageError
from titan_lite.config.schema import Comm
from titan_lite.metrics.device import device_name
from titan_lite.models.plan import make_plan
from titan_lite.nn.attention import ScaledDotProductAttention
from titan_lite.nn.block import Block
from titan_lite.nn.rope import RotaryEmbedding
from titan_lite.nn.token_context import NO_CONTEXT
from titan_lite.planner.cluster import Cluster
from titan_lite.planner.hardware import Device, find_device
from titan_lite.planner.job import Job
from titan_lite.planner.kernels import Rates
from titan_lite.planner.read import read_job
from titan_lite.planner.search import divisors
from titan_lite.runtime.collectives import all_gather_single, reduce_scatter_single
from titan_lite.runtime.distributed import (
    Process,
    all_reduce,
    start_process_group,
    stop_process_group,
)
from titan_lite.runtime.gpus import count_gpus
from titan_lite.training.loss import cross_entropy_sum

Work = Callable[[], object]
Seconds = dict[str, float]
ROUNDS, LAPS = 3, 5
# Share of the time budget for measuring; the rest is for start-up and for rounding of repetitions.
SHARE = 0.7
# `source` of a device without a datasheet.
MEASURED = "measured"
# `dim` of the model whose loss is measured.
LOSS_DIM = 64
# Candidates for the constant "inner": inner features at which a matmul reaches half of its rate.
INNER = (0.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0)


@dataclass(frozen=True)
class Sizes:
    """Sizes of the measured kernels, which then take milliseconds on a kind of device.

    linears: (tokens, inputs, outputs). lengths: sequence lengths of attention. batches: tokens of
    the element-wise kernels. rings: bytes of the collectives.
    """

    dim: int
    linears: Sequence[tuple[int, int, int]]
    lengths: Sequence[int]
    batches: Sequence[int]
    vocabulary: int
    rings: Sequence[int]


SIZES = {
    "cuda": Sizes(
        4096,
        ((4096, 4096, 4096), (8192, 4096, 1024), (8192, 4096, 14336), (8192, 14336, 4096),
         (16384, 2048, 2048), (8192, 8192, 8192)),
        (2048, 8192, 32768),
        (16, 8192, 16384),
        65536,
        (2**20, 2**24, 2**28),
    ),
    "cpu": Sizes(
        256,
        ((512, 256, 256), (2048, 256, 256), (1024, 256, 768), (1024, 768, 256), (1024, 512, 1536),
         (1024, 1536, 512)),
        (256, 512, 1024, 2048),
        (16, 1024, 4096),
        4096,
        (2**14, 2**18, 2**22, 2**24),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Ring:
    """A collective over ranks that are `stride` apart, on `size` bytes."""

    operation: str
    ranks: int
    stride: int
    size: int

    def __str__(self) -> str:
        return f"{self.operation} of {self.size:,} bytes, ranks {self.ranks}, stride {self.stride}"


@dataclass(frozen=True)
class Machine:
    """The measured device, and how much is measured; equal on all ranks.

    per_node: processes of a node. budget: seconds for all measurements.
    """

    process: Process
    per_node: int
    budget: float

    @property
    def sizes(self) -> Sizes:
        """Sizes for this kind of device."""
        return SIZES[self.process.device.type]

    @property
    def dtype(self) -> torch.dtype:
        """The measured dtype: float32 on a CPU; bfloat16 on a GPU, or float16 without it."""
        if self.process.device.type == "cpu":
            return torch.float32
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bf16 else torch.float16

    @property
    def other_dtype(self) -> torch.dtype:
        """The dtype of which only the peak is measured."""
        return torch.bfloat16 if self.dtype is torch.float32 else torch.float32

    def job(self) -> Job:
        """A job that runs the measured kernels."""
        dim = self.sizes.dim
        keys = {"dim": dim, "ffn_dim": 3 * dim, "num_heads": dim // 64, "num_kv_heads": dim // 64}
        overrides = [f"--model.{key}={value}" for key, value in keys.items()]
        plan = make_plan(None, overrides, 1, with_files=False)
        job = read_job(plan.config, plan.dims, plan.family, plan.args)
        return dataclasses.replace(job, width=self.dtype.itemsize)

    def rings(self) -> list[Ring]:
        """Collectives over every axis that a mesh of these processes can have."""
        world = self.process.world_size
        return [
            Ring(operation, ranks, stride, size)
            for ranks in divisors(world)[1:]
            for stride in sorted({1, world // ranks})
            for operation in ("all_gather", "reduce_scatter", "all_reduce")
            for size in self.sizes.rings
        ]

    def measure(self, cases: Mapping[str, Callable[[], Work]], share: float = 1.0) -> Seconds:
        """Returns the median seconds of each case, averaged over ranks. All ranks must call it.

        The cases take turns. share: part of the time budget.
        """
        laps: dict[str, list[float]] = {name: [] for name in cases}
        each = SHARE * share * self.budget / (max(1, len(cases)) * ROUNDS)
        for _ in range(ROUNDS):
            for name, make in cases.items():
                laps[name] += self._turn(make(), each)
        medians = [statistics.median(lap) for lap in laps.values()]
        total = torch.tensor(medians, dtype=torch.float64, device=self.process.device)
        means = all_reduce(total, "sum") / self.process.world_size
        return dict(zip(cases, means.tolist(), strict=True))

    def _turn(self, work: Work, budget: float) -> list[float]:
        self._lap(work, 1)
        once = torch.tensor(self._lap(work, 1), device=self.process.device)
        # All ranks must repeat a collective equally often.
        count = max(1, int(budget / LAPS / all_reduce(once, "max").item()))
        return [self._lap(work, count) for _ in range(LAPS)]

    def _lap(self, work: Work, count: int) -> float:
        on_gpu = self.process.device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            work()
        if on_gpu:
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / count


class Kernels:
    """The kernels to measure on one device. Each method makes its tensors, and returns the work."""

    def __init__(self, machine: Machine) -> None:
        self.sizes, self.dtype, self.other_dtype = machine.sizes, machine.dtype, machine.other_dtype
        self.device, self.args = machine.process.device, machine.job().args

    def cases(self) -> dict[str, Callable[[], Work]]:
        """Returns all kernels by name; each allocates its tensors when it is called."""
        cases: dict[str, Callable[[], Work]] = {"copy": self.copy, "optimizer": self.optimizer}
        for number, shape in enumerate(self.sizes.linears):
            cases[f"linear {number}"] = partial(self.linear, *shape, self.dtype)
            cases[f"other linear {number}"] = partial(self.linear, *shape, self.other_dtype)
        for length in self.sizes.lengths:
            for way in ("forward", "both"):
                cases[f"attention {way} {length}"] = partial(self.attention, length, way)
        for tokens in self.sizes.batches:
            cases[f"elementwise {tokens}"] = partial(self.elementwise, tokens)
        return cases | {"loss": self.loss}

    def random(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Random numbers, because a device draws less power for zeros."""
        numbers = torch.randn(shape, device=self.device, dtype=dtype or self.dtype)
        return numbers.requires_grad_()

    def copy(self) -> Work:
        """A copy of as many bytes as the largest ring moves."""
        source = torch.randn(self.sizes.rings[-1] // 4, device=self.device)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    def linear(self, M: int, K: int, N: int, dtype: torch.dtype) -> Work:
        """A linear layer's forward and backward."""
        x, weight = self.random(M, K, dtype=dtype), self.random(N, K, dtype=dtype)
        gradient = torch.randn(M, N, device=self.device, dtype=dtype)
        out = nn.functional.linear
        return lambda: torch.autograd.grad(out(x, weight), (x, weight), gradient)

    def attention(self, length: int, way: str) -> Work:
        """Causal attention of one sequence."""
        shape = 1, self.args.num_heads, length, self.args.head_size
        qkv, attend = (
            [self.random(*shape) for _ in range(3)],
            ScaledDotProductAttention(causal=True),
        )
        if way == "forward":
            return lambda: attend(*qkv, NO_CONTEXT)
        gradient = torch.randn(shape, device=self.device, dtype=self.dtype)
        return lambda: torch.autograd.grad(attend(*qkv, NO_CONTEXT), qkv, gradient)

    def elementwise(self, tokens: int) -> Work:
        """The element-wise kernels of a block, forward and backward."""
        args = dataclasses.replace(self.args, max_seq_len=tokens)
        rope = RotaryEmbedding(args).to(self.device)
        block = Block(args, rope).to(self.device, self.dtype)
        rope.init_buffers(self.device)
        x, gate, up = (self.random(1, tokens, n) for n in (args.dim, args.ffn_dim, args.ffn_dim))
        heads = [self.random(1, tokens, args.num_heads, args.head_size) for _ in range(2)]

        def work() -> None:
            h = x + block.attention_norm(x)
            outputs = (
                h + block.ffn_norm(h),
                nn.functional.silu(gate) * up,
                *block.attention.rope(*heads),
            )
            torch.autograd.grad(outputs, (x, gate, up, *heads), list(outputs))

        return work

    def loss(self) -> Work:
        """The head and its cross-entropy, so narrow that the matmuls take little time."""
        tokens = self.sizes.batches[1]
        hidden, weight = self.random(tokens, LOSS_DIM), self.random(self.sizes.vocabulary, LOSS_DIM)
        labels = torch.arange(tokens, device=self.device) % self.sizes.vocabulary

        def work() -> None:
            loss = cross_entropy_sum(
                hidden, weight, labels=labels, num_chunks=1, vocab_size=self.sizes.vocabulary
            )
            torch.autograd.grad(loss, (hidden, weight))

        return work

    def optimizer(self) -> Work:
        """An optimizer's step, and the norm of its gradients."""
        with torch.device(self.device):
            layers = nn.Sequential(*(nn.Linear(*shape[1:]) for shape in self.sizes.linears))
        for parameter in layers.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer = torch.optim.AdamW(layers.parameters(), fused=True)

        def work() -> None:
            nn.utils.clip_grad_norm_(layers.parameters(), 1.0)
            optimizer.step()

        return work


def exchanges(machine: Machine) -> dict[str, Callable[[], Work]]:
    """Returns the collectives to measure, by name. All ranks must call it."""
    process, groups = machine.process, {}
    for ranks in divisors(process.world_size)[1:]:
        shape = process.world_size // ranks, ranks
        mesh = init_device_mesh(process.device.type, shape, mesh_dim_names=("outer", "inner"))
        groups[ranks, 1] = mesh.get_group("inner")
        if shape[0] > 1:
            groups[shape[0], ranks] = mesh.get_group("outer")
    return {
        str(ring): partial(_exchange, ring, groups[ring.ranks, ring.stride], process.device)
        for ring in machine.rings()
    }


def _exchange(ring: Ring, group: dist.ProcessGroup, device: torch.device) -> Work:
    part = torch.zeros(ring.size // 4 // ring.ranks, device=device)
    whole = torch.zeros(len(part) * ring.ranks, device=device)
    match ring.operation:
        case "all_gather":
            return lambda: all_gather_single(whole, part, group)
        case "reduce_scatter":
            return lambda: reduce_scatter_single(part, whole, group=group)
    return lambda: dist.all_reduce(whole, group=group)


def overlaps(machine: Machine, kernels: Kernels, seconds: Seconds) -> dict[str, Callable[[], Work]]:
    """Returns matmuls alone, and matmuls during an all-gather over all ranks."""
    process, sizes = machine.process, machine.sizes
    ring = Ring("all_gather", process.world_size, 1, sizes.rings[-1])
    count = math.ceil(1.5 * seconds[str(ring)] / seconds["linear 0"])
    part = torch.zeros(ring.size // 4 // ring.ranks, device=process.device)
    whole = torch.zeros(len(part) * ring.ranks, device=process.device)

    def products() -> Work:
        product = kernels.linear(*sizes.linears[0], kernels.dtype)
        return lambda: [product() for _ in range(count)]

    def overlapped() -> Work:
        several = products()

        def work() -> None:
            handle = all_gather_single(whole, part, async_op=True)
            several()
            handle.wait()

        return work

    return {"alone": products, "overlapped": overlapped}


def explain(cluster: Cluster, machine: Machine) -> Seconds:
    """Predicts the seconds of all measurements, except those of `overlaps`."""
    sizes, job = machine.sizes, machine.job()
    other = dataclasses.replace(job, width=machine.other_dtype.itemsize)
    rates, other_rates = Rates(cluster, job), Rates(cluster, other)
    seconds = {"copy": 2 * sizes.rings[-1] / cluster.hbm}
    for number, shape in enumerate(sizes.linears):
        seconds[f"linear {number}"] = sum(rates.linear(*shape))
        seconds[f"other linear {number}"] = sum(other_rates.linear(*shape))
    for length in sizes.lengths:
        one = dataclasses.replace(job, micro_batch=1, seq_len=length, span=length)
        forward, backward = rates.attention(one)
        seconds[f"attention forward {length}"] = forward
        seconds[f"attention both {length}"] = forward + backward
    for tokens in sizes.batches:
        one = dataclasses.replace(job, micro_batch=1, seq_len=tokens)
        seconds[f"elementwise {tokens}"] = sum(rates.elementwise(one))
    tokens, rows = sizes.batches[1], sizes.vocabulary
    seconds["loss"] = rates.loss(job, tokens, rows) + sum(rates.linear(tokens, LOSS_DIM, rows))
    params = sum((inputs + 1) * outputs for _, inputs, outputs in sizes.linears)
    seconds["optimizer"] = rates.optimizer(params)
    for ring in machine.rings():
        passes = 2 if ring.operation == "all_reduce" else 1
        seconds[str(ring)] = passes * rates.ring(ring.size, ring.ranks, _inner(machine, ring))
    return seconds


def _inner(machine: Machine, ring: Ring) -> int:
    return max(1, min(ring.ranks, machine.per_node // ring.stride))


def _nodes(machine: Machine, ring: Ring) -> int:
    return ring.ranks // _inner(machine, ring)


# Constants with which the formulas give the datasheet's time.
NEUTRAL = {
    "kernel_us": 0.0,
    "hbm": 1.0,
    "matmul": 1.0,
    "inner": 0.0,
    "attention/flash": 1.0,
    "attention_forward": 1.0,
    "attention_backward": 1.0,
    "attention_forward_tokens": 0.0,
    "attention_backward_tokens": 0.0,
    "loss": 1.0,
    "optimizer": 1.0,
    "link": 1.0,
    "nic": 1.0,
    "hop_us": 0.0,
    "node_hop_us": 0.0,
}


def fit(cluster: Cluster, machine: Machine, seconds: Seconds) -> Cluster:
    """Returns the cluster with constants that reproduce the measured seconds."""
    sizes, constants = machine.sizes, dict(NEUTRAL)

    def explained(**values: float) -> Seconds:
        return explain(_with(cluster, constants | values), machine)

    plain = explained()
    cases = [f"elementwise {tokens}" for tokens in sizes.batches]
    launches = [3e-6 * Rates(cluster, machine.job()).bytes["launches"]] * len(cases)
    slowness, constants["kernel_us"] = _line([plain[c] for c in cases], launches, seconds, cases)
    constants["hbm"] = 1 / slowness

    linears = [f"linear {number}" for number in range(len(sizes.linears))]
    launch = 3e-6 * constants["kernel_us"]

    def shares(inner: float) -> list[float]:
        predicted = explained(inner=inner)
        return [
            math.log((predicted[c] - launch) / max(seconds[c] - launch, seconds[c] / 2))
            for c in linears
        ]

    constants["inner"] = min(INNER, key=lambda inner: statistics.pstdev(shares(inner)))
    constants["matmul"] = math.exp(statistics.mean(shares(constants["inner"])))

    forward = [f"attention forward {length}" for length in sizes.lengths]
    both = [f"attention both {length}" for length in sizes.lengths]
    times = seconds | {b: seconds[b] - seconds[f] for f, b in zip(forward, both, strict=True)}
    rates = []
    for way, cases in (("forward", forward), ("backward", both)):
        first = [plain[f] * (1 if cases is forward else 2.5) for f in forward]
        second = [t / length for t, length in zip(first, sizes.lengths, strict=True)]
        slowness, rise = _line(first, second, times, cases)
        rates.append(1 / slowness)
        constants[f"attention_{way}_tokens"] = rise / slowness
    constants["attention/flash"] = rates[0]
    constants["attention_backward"] = rates[1] / rates[0]

    for name, product in (("loss", explained(loss=math.inf)["loss"]), ("optimizer", 0.0)):
        rest = max(seconds[name] - product, seconds[name] / 10)
        constants[name] = (explained()[name] - product) / rest

    near = [ring for ring in machine.rings() if _nodes(machine, ring) == 1]
    if near:
        cases, hops = list(map(str, near)), [_hops(ring, ring.ranks - 1) for ring in near]
        slowness, constants["hop_us"] = _line([plain[c] for c in cases], hops, seconds, cases)
        constants["link"] = 1 / slowness
    far = [ring for ring in machine.rings() if _nodes(machine, ring) > 1]
    if far:
        cases, hops = list(map(str, far)), [_hops(ring, _nodes(machine, ring)) for ring in far]
        network = explained(link=math.inf, hop_us=0.0)
        inside = [_hops(ring, ring.ranks - _nodes(machine, ring)) for ring in far]
        times = {
            case: max(seconds[case] - hop * constants["hop_us"], seconds[case] / 10)
            for case, hop in zip(cases, inside, strict=True)
        }
        slowness, constants["node_hop_us"] = _line([network[c] for c in cases], hops, times, cases)
        constants["nic"] = 1 / slowness
    unknown = ([] if near else ["link", "hop_us"]) + ([] if far else ["nic", "node_hop_us"])
    for name in unknown:
        del constants[name]
    if "overlapped" in seconds:
        largest = Ring("all_gather", machine.process.world_size, 1, sizes.rings[-1])
        longer = seconds["overlapped"] - seconds["alone"]
        constants["interference"] = max(0.0, longer / seconds[str(largest)])
    return _with(cluster, {name: float(f"{value:.4g}") for name, value in constants.items()})


def _hops(ring: Ring, number: int) -> float:
    """Seconds that the hops of a ring take, at one microsecond each."""
    return number * 1e-6 * (2 if ring.operation == "all_reduce" else 1)


def _with(cluster: Cluster, constants: Mapping[str, float]) -> Cluster:
    """Returns the cluster with these constants instead of those of its architecture."""
    special = {name: f"{name}/{cluster.device.architecture}" for name in constants}
    measured = {
        special[name] if special[name] in cluster.values else name: value
        for name, value in constants.items()
    }
    return dataclasses.replace(cluster, measured=measured, calibrated=True)


def _line(
    first: Sequence[float], second: Sequence[float], seconds: Seconds, cases: Sequence[str]
) -> tuple[float, float]:
    """Returns (a, b) with which a * first + b * second has the least relative errors."""
    times = np.array([seconds[case] for case in cases])
    columns = np.array([first, second]).T / times[:, None]
    a, b = np.linalg.lstsq(columns, np.ones(len(times)), rcond=None)[0]
    if a <= 0 or b < 0:
        # A negative result is noise: fit `first` alone.
        return float(np.median(times / first)), 0.0
    return float(a), float(b)


def describe_machine(machine: Machine, seconds: Seconds) -> Cluster:
    """Devices and nodes, from the datasheet if there is one, else from the best measurements."""
    process, name = machine.process, device_name(machine.process.device)
    device, multiprocessors = find_device(name), 1
    if device is None:
        linears = range(len(machine.sizes.linears))
        flops = [6 * math.prod(shape) for shape in machine.sizes.linears]
        best = max(flops[n] / seconds[f"linear {n}"] for n in linears) / 1e12
        faster = [seconds[f"linear {n}"] / seconds[f"other linear {n}"] for n in linears]
        other = best * math.exp(statistics.mean(map(math.log, faster)))
        on_gpu = process.device.type == "cuda"
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / machine.per_node
        if on_gpu:
            properties = torch.cuda.get_device_properties(process.device)
            memory, multiprocessors = properties.total_memory, properties.multi_processor_count
        facts: dict[str, Any] = dict.fromkeys(Device.__dataclass_fields__) | {
            "name": name,
            "names": (),
            "bf16_tflops": best if on_gpu else other,
            "fp32_tflops": other if on_gpu else best,
            "memory_gb": memory / 2**30,
            "hbm_gbs": 2 * machine.sizes.rings[-1] / seconds["copy"] / 1e9,
            "architecture": name,
            "multiprocessors": multiprocessors,
            "source": MEASURED,
        }
        device = Device(**facts)
    return Cluster(
        name="this-machine",
        device=device,
        gpus_per_node=machine.per_node,
        node_nic_gbs=50.0 * machine.per_node,
    )


def calibrate(process: Process, per_node: int, budget: float) -> tuple[Cluster, Seconds, Seconds]:
    """Returns the cluster, the measured and the predicted seconds. All ranks must call it."""
    machine = Machine(process, per_node, budget)
    kernels = Kernels(machine)
    seconds = machine.measure(kernels.cases(), 0.6)
    if process.world_size > 1:
        seconds |= machine.measure(exchanges(machine), 0.3)
        seconds |= machine.measure(overlaps(machine, kernels, seconds), 0.1)
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
