"""The constants with which the planner's formulas give the times that calibrate measured."""

import dataclasses
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from titan_lite.metrics.device import device_name
from titan_lite.planner.cluster import Cluster
from titan_lite.planner.hardware import Device, find_device
from titan_lite.planner.kernels import Rates
from titan_lite.planner.step_time import StepModel
from titan_lite.tools.calibrate_measure import BLOCKS, LOSS_DIM, Machine, Ring, Seconds

# `source` of a device without a datasheet.
MEASURED = "measured"
# Candidates for the constant "inner": inner features at which a matmul reaches half of its rate.
INNER = (0.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0)


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
    for tokens in sizes.batches[1:]:
        length = sizes.lengths[0]
        for t in sorted({1, machine.tp}):
            one = dataclasses.replace(
                job, micro_batch=tokens // length, seq_len=length, span=length, tp=t
            )
            block = StepModel(cluster, one).block(one)
            name = f"blocks {tokens}" + (f", tp {t}" if t > 1 else "")
            seconds[name] = BLOCKS * (block.seconds(0) + block.seconds(1))
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
    "tp": 1.0,
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

    blocks, kernels = [f"blocks {tokens}" for tokens in sizes.batches[1:]], explained()
    # In a block the same kernels are slower: caches, autograd, Python.
    slowdown = math.exp(statistics.mean(math.log(seconds[c] / kernels[c]) for c in blocks))
    for name in ("matmul", "attention/flash", "hbm"):
        constants[name] /= slowdown
    # The launches of a block; and rates relative to "hbm", which stay as measured.
    for name in ("kernel_us", "loss", "optimizer"):
        constants[name] *= slowdown

    near = [ring for ring in machine.rings() if _nodes(machine, ring) == 1]
    if near:
        cases, hops = list(map(str, near)), [_hops(ring, ring.ranks - 1) for ring in near]
        slowness, constants["hop_us"] = _line([plain[c] for c in cases], hops, seconds, cases)
        constants["link"] = 1 / slowness
    if machine.tp > 1:
        split = [f"{case}, tp {machine.tp}" for case in blocks]
        alone, whole = explained(tp=0.0), explained()
        added = [(seconds[c] - alone[c]) / (whole[c] - alone[c]) for c in split]
        constants["tp"] = max(0.0, statistics.mean(added))
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
