"""Step time of the Trainer over a bare PyTorch loop: same model, weights, optimizer and batches.

    python -m benchmarks.trainer_overhead [--rounds 8] [--steps 5]

One process. The two take turns, `steps` at a time; the ratio is the median over the rounds. In
float32 the two losses must agree; in bfloat16 the bare loop uses autocast.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.manifest import DEVICE, report
from titan_lite.config.load import load_config
from titan_lite.models.registry import resolve
from titan_lite.models.rules import check
from titan_lite.nn.build import build
from titan_lite.optim.schedule import lr_factor
from titan_lite.trainer import Trainer


def bare_loop(trainer: Trainer, dtype: torch.dtype) -> Callable[[int], float]:
    """A step of a plain nn.Module on the very batches and weights that the trainer begins with."""
    config = trainer.config
    model = build(*resolve(config.model)).to(DEVICE)
    model.load_state_dict({n: p.full_tensor() for n, p in trainer.model.named_parameters()})
    decayed = [p for p in model.parameters() if p.ndim > 1]
    kept = [p for p in model.parameters() if p.ndim == 1]
    settings = config.optimizer
    optimizer = torch.optim.AdamW(
        [{"params": decayed}, {"params": kept, "weight_decay": 0.0}],
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True,
    )
    batches = iter(trainer.build_loader())
    cast = torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32)

    def step(number: int) -> float:
        batch = next(batches)
        inputs, labels = batch.inputs.to(DEVICE), batch.labels.to(DEVICE)
        with cast:
            logits = model(inputs)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.training.max_norm)
        factor = lr_factor(number, config.lr_scheduler, config.training.steps)
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * factor
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def measure(dtype: str, rounds: int, steps: int) -> dict[str, Any]:
    """Ratios of one dtype; the first round warms up."""
    total = (rounds + 1) * steps
    with tempfile.TemporaryDirectory() as folder:
        overrides = (
            f"--training.steps={total}",
            f"--training.param_dtype={dtype}",
            "--metrics.log_freq=1",
            f"--job.dump_folder={folder}",
        )
        loaded = load_config("train_configs/debug.toml", overrides)
        trainer = Trainer(loaded, check(loaded, 1))
        bare = bare_loop(trainer, getattr(torch, dtype))
        ratios, seconds, losses = [], [], []
        for first in range(1, total + 1, steps):
            numbers = range(first, first + steps)
            ours, records = timed(trainer.train_step, numbers)
            theirs, bare_losses = timed(bare, numbers)
            losses += [(r["loss"], b) for r, b in zip(records, bare_losses, strict=True)]
            if first > 1:
                ratios.append(ours / theirs)
                seconds.append(theirs / steps)
        trainer.close()
    return {
        "dtype": dtype,
        "trainer_over_bare_loop": round(statistics.median(ratios), 4),
        "ratio_range": [round(min(ratios), 4), round(max(ratios), 4)],
        "bare_step_seconds": round(statistics.median(seconds), 4),
        "largest_relative_loss_difference": max(abs(a - b) / b for a, b in losses),
    }


def timed(step: Callable[[int], Any], numbers: Iterable[int]) -> tuple[float, list[Any]]:
    """Seconds and results of some steps, the device's work included."""
    start = time.perf_counter()
    results = [step(number) for number in numbers]
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    dtypes = ("float32", "bfloat16")
    results = [measure(dtype, options.rounds, options.steps) for dtype in dtypes]
    report("trainer_overhead", results)
