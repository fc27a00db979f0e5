"""The summary of a dry run, as text or JSON."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import torch

from titan_lite.config.dims import ParallelDims
from titan_lite.config.units import format_scaled
from titan_lite.dryrun.run import DryRank, dry_runs, left_out
from titan_lite.metrics.device import GIB
from titan_lite.metrics.record import FORMULA
from titan_lite.models.plan import Plan
from titan_lite.planner.hardware import Device
from titan_lite.planner.predict import fitting_settings

WORDS = {
    "parameters": "parameters",
    "gradients": "gradients, sharded",
    "optimizer": "optimizer state",
    "activations": "activations",
    "unsharded": "gathered parameters, their gradients, and FSDP's buffers",
    "logits": "logits and the loss",
    "buffers": "rotary tables",
}


def summarize_dry_run(plan: Plan, ranks: Sequence[int], device: Device, *, as_json: bool) -> str:
    """Dry-runs the ranks and returns the summary."""
    results = dry_runs(plan, ranks)
    notes = left_out(plan.config)
    if as_json:
        return json.dumps(_facts(results, plan, device, notes), indent=2)
    model = plan.config.model
    lines = [
        f"{model.name} {model.flavor}: {results[0].parameters:,} parameters on "
        f"{plan.dims.world_size} x {device.name}",
        f"  mesh              {_mesh(plan.dims)}",
        *(f"  approximated      {note}" for note in notes),
        "  measured          the second step, without a log record, on fake tensors with this "
        "rank's local shapes",
    ]
    for rank in results:
        lines += ["", *_rank(rank, device)]
    peak = max(rank.measured.peak.bytes for rank in results)
    if device.memory_gb is not None and peak > device.memory_gb * GIB:
        settings = fitting_settings(plan, device)
        lines += ["", "Would fit", *(f"  {text}" for text in settings or ["only on more devices"])]
    return "\n".join(lines)


def _rank(rank: DryRank, device: Device) -> list[str]:
    measured, peak = rank.measured, rank.measured.peak
    place = ", ".join(f"{axis} {number}" for axis, number in rank.place.items())
    categories = sorted(peak.categories.items(), key=lambda item: -item[1])
    lines = [
        f"Rank {rank.rank} ({place}), pipeline stage {', '.join(map(str, rank.stages))}",
        rank.applied,
        f"  between steps     parameters {_size(measured.held['parameters'])}, optimizer state "
        f"{_size(measured.held['optimizer'])}; gradients {_size(measured.held['gradients'])} "
        "before the optimizer's step",
        f"  peak memory       {_of_capacity(peak.bytes, device)}",
        *(f"    {_size(size):>14}  {WORDS[name]}" for name, size in categories if size),
        f"  FLOPs a step      {format_scaled(measured.flops, 'FLOP')}{_ratio(rank)}",
        "  collectives          count        size",
    ]
    for collective in measured.collectives:
        name = f"{collective.operation} over {collective.axis}"
        lines.append(f"    {collective.count:>22,}  {_size(collective.bytes):>10}  {name}")
    return lines


def _facts(
    results: Sequence[DryRank], plan: Plan, device: Device, notes: Sequence[str]
) -> dict[str, Any]:
    memory = None if device.memory_gb is None else int(device.memory_gb * GIB)
    return {
        "torch": torch.__version__,
        "device": device.name,
        "memory_bytes": memory,
        "world_size": plan.dims.world_size,
        "mesh": dataclasses.asdict(plan.dims),
        "parameters": results[0].parameters,
        "formula": FORMULA,
        "approximations": list(notes),
        "ranks": [
            dataclasses.asdict(rank)
            | {"fits": None if memory is None else rank.measured.peak.bytes <= memory}
            for rank in results
        ],
    }


def _of_capacity(size: int, device: Device) -> str:
    if device.memory_gb is None:
        return f"{_size(size)}; the memory of {device.name} is not known"
    text = f"{_size(size)} of {device.memory_gb:g} GiB"
    if (beyond := size - device.memory_gb * GIB) > 0:
        text += f": DOES NOT FIT, by {_size(beyond)}"
    return text


def _mesh(dims: ParallelDims) -> str:
    axes = " x ".join(f"{axis} {getattr(dims, axis)}" for axis in dims.AXES)
    return f"{axes}, ep {dims.ep}" if dims.ep > 1 else axes


def _ratio(rank: DryRank) -> str:
    """Returns the ratio to the formula's FLOPs, if the rank has any."""
    if not rank.formula_flops:
        return ""
    ratio = rank.measured.flops / rank.formula_flops
    return f", {ratio:.2f} times the formula's {format_scaled(rank.formula_flops, 'FLOP')}"


def _size(size: float) -> str:
    return format_scaled(size, "B", 1024)
