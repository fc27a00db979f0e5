"""The output of titan-lite plan: one run's memory, time, cost and energy, or layouts to choose."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from titan_lite.config.units import format_scaled
from titan_lite.planner.memory import room
from titan_lite.planner.predict import DAYS, Advice, Prediction, setting
from titan_lite.planner.search import Layout, SearchResult

WORDS = {
    "matmul": "matrix products",
    "attention": "attention",
    "elementwise": "element-wise kernels",
    "head": "head and loss",
    "optimizer": "optimizer",
    "fsdp": "FSDP, exposed",
    "tp": "tensor parallel, exposed",
    "cp": "context parallel, exposed",
    "ep": "expert parallel",
    "pp": "pipeline sends",
    "bubble": "pipeline bubble",
    "stragglers": "stragglers",
}
LIMITS = {
    "the rate of matrix products": ("matmul", "attention", "head"),
    "memory traffic": ("elementwise", "optimizer"),
    "communication": ("fsdp", "tp", "cp", "ep", "pp", "stragglers"),
    "the pipeline bubble": ("bubble",),
}
BAR = 40


def facts(p: Prediction, better: Sequence[Advice]) -> dict[str, Any]:
    """The prediction as JSON."""
    low, high, seconds = p.interval.low, p.interval.high, p.step.seconds
    return {
        "cluster": p.step.cluster.name,
        "device": p.step.cluster.device.name,
        "gpus": p.step.job.world_size,
        "memory": {
            "fits": p.fits,
            "may_fit": p.share <= 1,
            "bytes": round(p.peak.bytes),
            "device_bytes": round(p.step.cluster.memory),
            "places": [
                {"place": m.place, "bytes": round(m.bytes)}
                | {"parts": {name: round(size) for name, size in m.parts.items()}}
                for m in p.memory
            ],
        },
        "step": {
            "seconds": seconds,
            # Bounds of the 80 % and the 90 % interval, which is 1.5 times as wide.
            "seconds_80": [low, high],
            "seconds_90": [seconds - 1.5 * (seconds - low), seconds + 1.5 * (high - seconds)],
            "wps": p.step.wps,
            "tflops": p.tflops,
            "mfu": p.mfu,
            "watts": p.step.watts or None,
            "parts": p.step.parts,
            "limit": limit(p),
            "notes": list(p.interval.notes),
        },
        "run": {
            "tokens": p.tokens,
            "days": p.seconds / DAYS,
            "gpu_hours": p.gpu_hours,
            "cost": p.cost,
            "mwh_devices": p.device_mwh or None,
            "mwh_with_hosts": p.total_mwh if p.device_mwh else None,
        },
        "advice": [
            {
                "settings": values,
                "seconds": change.step.seconds,
                "gain": 1 - change.step.seconds / p.step.seconds,
            }
            for values, change in better
        ],
    }


def limit(p: Prediction) -> str:
    """The kind of work that takes most of the step's time."""
    parts = p.step.parts
    return max(LIMITS, key=lambda words: sum(parts[name] for name in LIMITS[words]))


def text(p: Prediction, better: Sequence[Advice]) -> str:
    """The prediction as text."""
    seconds, ratio = p.step.seconds, 100 / p.step.seconds
    low, high = p.interval.low, p.interval.high
    slow, fast = (p.step.job.tokens / p.step.job.world_size / bound for bound in (high, low))
    lines = [
        f"{p.step.job.world_size} x {p.step.cluster.device.name} ({p.step.cluster.name})",
        f"  memory      {_size(p.peak.bytes)} of {_size(p.step.cluster.memory)}: {_fit(p)}",
        *(
            f"    {_size(size):>12}  {name}"
            for name, size in sorted(p.peak.parts.items(), key=lambda item: -item[1])
            if size
        ),
        f"  step        {seconds:.3g} s (80 % interval: {low:.3g} to {high:.3g} s)",
        f"  speed       {p.step.wps:,.0f} tokens/s per device ({slow:,.0f} to {fast:,.0f}), "
        f"{p.tflops:.0f} TFLOP/s, MFU {p.mfu:.1%}",
        *(f"  note        {note}" for note in p.interval.notes),
        "Where the time goes",
        *(
            f"  {WORDS[name]:<26}{'#' * max(1, round(BAR * part / seconds)):<{BAR}} "
            f"{part * ratio:5.1f} %  {part:.3g} s"
            for name, part in p.step.parts.items()
            if part > 0.0005 * seconds
        ),
        f"Limited by {limit(p)}",
        f"The run: {format_scaled(p.tokens, 'tokens')}",
        f"  time        {p.seconds / DAYS:,.2f} days "
        f"({p.seconds * low / seconds / DAYS:,.2f} to {p.seconds * high / seconds / DAYS:,.2f})",
        f"  GPU-hours   {p.gpu_hours:,.0f}, {_cost(p)}",
        f"  energy      {_energy(p)}",
    ]
    if better:
        lines.append("Would help most" if p.fits else "Would fit")
    for values, change in better:
        gain = 1 - change.step.seconds / seconds
        settings = " ".join(setting(key, value) for key, value in values.items())
        lines.append(f"  {settings}: {change.step.seconds:.3g} s a step ({-gain:+.0%})")
    return "\n".join(lines)


def search_text(result: SearchResult, best: Sequence[Layout], seconds: float) -> str:
    """The layouts of a search as text."""
    lines = [
        f"{result.tried:,} layouts, {result.legal:,} legal, {len(result.layouts):,} fit, "
        f"{seconds:.1f} s"
    ]
    for number, layout in enumerate(best, start=1):
        prediction = Prediction(layout.step, (), layout.step.job.tokens)
        bounds = prediction.interval
        lines.append(
            f"{number}. {layout.step.seconds:.3g} s a step "
            f"({bounds.low:.3g} to {bounds.high:.3g}), {layout.step.wps:,.0f} tokens/s per device, "
            f"{_size(layout.memory)}, "
            f"MFU {prediction.mfu:.1%}"
        )
        lines.append("   " + " ".join(setting(k, v) for k, v in layout.values.items()))
        lines += [f"   note: {note}" for note in bounds.notes]
    if not best:
        lines.append("No layout fits: use more devices, or a smaller model, batch or sequence")
    return "\n".join(lines)


def search_facts(result: SearchResult, best: Sequence[Layout]) -> dict[str, Any]:
    """The same as JSON."""
    return {
        "tried": result.tried,
        "legal": result.legal,
        "fit": len(result.layouts),
        "best": [
            {
                "settings": layout.values,
                "seconds": layout.step.seconds,
                "wps": layout.step.wps,
                "bytes": round(layout.memory),
                "parts": layout.step.parts,
            }
            for layout in best
        ],
    }


def layout_toml(layout: Layout, config: str, target: str) -> str:
    """A file that extends the configuration by a layout."""
    base = os.path.relpath(Path(config).resolve(), Path(target).resolve().parent)
    lines, section = [f"extends = {json.dumps(base)}"], ""
    for key, value in sorted(layout.values.items()):
        name, _, field = key.partition(".")
        if name != section:
            section = name
            lines += ["", f"[{section}]"]
        lines.append(f"{field} = {json.dumps(value)}")
    return "\n".join(lines) + "\n"


def _fit(p: Prediction) -> str:
    if p.fits:
        return f"fits, {1 - p.share:.0%} left"
    if p.share <= 1:
        left = f"less than {1 - room(p.step.job):.0%} is left"
        return f"may fit: {left} for the CUDA context, fragmentation and the planner's own error"
    return f"DOES NOT FIT, by {_size(p.peak.bytes - p.step.cluster.memory)}"


def _cost(p: Prediction) -> str:
    price = p.step.cluster.price_per_gpu_hour
    return f"${p.cost:,.0f} at ${price:g} each" if price else "cost not computed: the price is 0"


def _energy(p: Prediction) -> str:
    if not p.device_mwh:
        return "not computed: the cluster's file has no device power"
    return (
        f"{p.device_mwh:,.3g} MWh of the devices ({p.step.watts:.0f} W each), "
        f"{p.total_mwh:,.3g} MWh with hosts and PUE {p.step.cluster.pue:g}"
    )


def _size(size: float) -> str:
    return format_scaled(size, "B", 1024)
