"""Run folders without a run: what compare and report read."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from titan_lite.config.load import load_config


def facts(*overrides: str, **more: Any) -> dict[str, Any]:
    """Returns the content of a run.json of one process."""
    return {
        "started": "2026-01-02T03:04:05+0000",
        "versions": {"titan_lite": "0.1.0", "torch": "2.13.0", "python": "3.12.1"},
        "git_commit": "0123456789abcdef",
        "environment": {"system": "Linux x86_64", "cpu_capability": "AVX2", "threads": 1},
        "device": "AMD EPYC",
        "mesh": dict.fromkeys(("pp", "dp_replicate", "dp_shard", "cp", "tp"), 1),
        "applied": {"blocks": 2, "modules": {"FSDP module": ["model"]}, "precision": "float32"},
        "parameters": 1_000_000,
        "peak": {"tflops": 1.0, "source": "metrics.peak_tflops"},
        "resumed_from_step": 0,
        "config": load_config(
            None, ["--training.param_dtype=float32", "--metrics.log_freq=1", *overrides]
        ).config.model_dump(),
        **more,
    }


def segments(*parts: tuple[int, str]) -> list[dict[str, Any]]:
    """Segments of a run.json: the step that each starts after, and an override."""
    return [facts(override, resumed_from_step=step) for step, override in parts]


def record(step: int, loss: float | str, grad_norm: float | str) -> dict[str, Any]:
    return {
        "step": step,
        "loss": loss,
        "grad_norm": grad_norm,
        "lr": 1e-3 / step,
        "tokens": 512 * step,
        "wps": 1000.0 + step,
        "seconds_per_step": 0.5,
        "mfu": 12.5,
        "data_wait": 0.25,
        "memory_gib": 0.5,
    }


def write_run(
    folder: Path,
    loss: Sequence[float | str],
    grad_norm: Sequence[float | str] | None = None,
    *overrides: str,
    **more: Any,
) -> Path:
    """A run folder whose records hold these values from step 1 on."""
    folder.mkdir(parents=True)
    norms = grad_norm or [1.0] * len(loss)
    lines = [
        json.dumps(record(step, *values))
        for step, values in enumerate(zip(loss, norms, strict=True), start=1)
    ]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "run.json").write_text(json.dumps(facts(*overrides, **more)))
    return folder
