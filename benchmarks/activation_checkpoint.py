"""Step time and peak activation memory of each mode of activation checkpointing, side by side.

    python -m benchmarks.activation_checkpoint [CONFIG] [--rounds 8] [--steps 2]
        [--modes none full ...] [--section.key=value ...]

One process per mode, since the compiler's memory budget is a process's; they take turns, `steps`
at a time, and ratios to the first mode are medians over the rounds. Memory is what forward and
backward need beyond weights, gradients and optimizer state: on CUDA by the allocator's peak, on
the CPU by torch's MemTracker, which cannot look into compiled blocks: for those it is what is
saved for backward.
"""

import argparse
import contextlib
import multiprocessing
import statistics
import sys
import tempfile
import time
from functools import partial

import torch
from torch.distributed._tools.mem_tracker import MemTracker

from benchmarks.manifest import DEVICE, report
from titan_lite.config.load import load_config
from titan_lite.loss import cross_entropy_sum
from titan_lite.models.rules import check
from titan_lite.trainer import Trainer

EAGER: dict[str, tuple[str, ...]] = {
    "none": (),
    "full": ("mode=full",),
    "every_nth 2": ("mode=every_nth",),
    "first_k 1": ("mode=first_k",),
    "fraction 0.5": ("mode=fraction",),
    "selective_op": ("mode=selective_op",),
    "attention": ("mode=selective_op", 'save=["attention"]'),
    "matmul": ("mode=selective_op", 'save=["attention", "matmul"]'),
}
COMPILED = {
    f"{mode}, compiled": settings
    for mode, settings in {
        "none": (),
        "full": ("mode=full",),
        "selective_op": ("mode=selective_op",),
        "memory_budget 0.5": ("mode=memory_budget",),
        "memory_budget 0.2": ("mode=memory_budget", "memory_budget=0.2"),
    }.items()
}
MODES = EAGER | COMPILED


class Run:
    """The trainer of this process, and the number of its next step."""

    trainer: Trainer
    step = 1


def build(config: str, mode: str, overrides: list[str]) -> None:
    """Builds the trainer of `mode` and takes its first step, which compiles."""
    settings = [f"--activation_checkpoint.{setting}" for setting in MODES[mode]]
    settings.append(f"--compile.enable={str(mode in COMPILED).lower()}")
    settings += ["--metrics.enable_tensorboard=false", "--metrics.peak_tflops=1.0"]
    settings.append(f"--job.dump_folder={tempfile.mkdtemp()}")
    loaded = load_config(config, [*settings, *overrides])
    Run.trainer = Trainer(loaded, check(loaded, 1))
    with contextlib.redirect_stdout(sys.stderr):  # The first step's line is no JSON.
        seconds_per_step(1)


def close() -> None:
    Run.trainer.close()


def seconds_per_step(steps: int) -> float:
    start = time.perf_counter()
    for _ in range(steps):
        Run.trainer.train_step(Run.step)
        Run.step += 1
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / steps


def activation_bytes() -> int:
    """What forward and backward need beyond what is held before and after."""
    forward_and_backward()  # From now on gradients are held.
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        forward_and_backward()
        return torch.cuda.max_memory_allocated() - held
    if Run.trainer.config.compile.enable:
        return saved_bytes()
    with MemTracker() as tracker:
        tracker.track_external(Run.trainer.model)
        forward_and_backward()
    peak, after = (tracker.get_tracker_snapshot(when)[DEVICE] for when in ("peak", "current"))
    return int(peak["Total"] - after["Total"])


def saved_bytes() -> int:
    """Of the distinct storages that autograd keeps from forward to backward."""
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward_and_backward()
    return sum(storage.nbytes() for storage in storages.values())


def forward_and_backward() -> None:
    trainer = Run.trainer
    batch = next(trainer.batches)
    loss = trainer.model(
        batch.inputs.to(DEVICE),
        head_loss=partial(
            cross_entropy_sum,
            labels=batch.labels.to(DEVICE),
            num_chunks=trainer.config.training.loss_chunks,
            vocab_size=trainer.vocab_size,
        ),
    )
    loss.backward()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", nargs="?", default="train_configs/debug.toml")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    options, overrides = parser.parse_known_args()
    context = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        pools = {mode: stack.enter_context(context.Pool(1)) for mode in options.modes}
        for mode, pool in pools.items():
            pool.apply(build, (options.config, mode, overrides))
        seconds: dict[str, list[float]] = {mode: [] for mode in options.modes}
        for _ in range(options.rounds):
            for mode, pool in pools.items():
                seconds[mode].append(pool.apply(seconds_per_step, (options.steps,)))
        memory = {mode: pool.apply(activation_bytes) for mode, pool in pools.items()}
        for pool in pools.values():
            pool.apply(close)
    first = options.modes[0]
    table = []
    for mode in options.modes:
        ratios = [ours / base for ours, base in zip(seconds[mode], seconds[first], strict=True)]
        table.append(
            {
                "mode": mode,
                "seconds_per_step": round(statistics.median(seconds[mode]), 4),
                "time_over_first": round(statistics.median(ratios), 3),
                "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
                "memory": "saved" if mode in COMPILED and DEVICE.type == "cpu" else "peak",
                "activation_mib": round(memory[mode] / 2**20, 2),
            }
        )
    report("activation_checkpoint", {"config": options.config, "with": overrides, "modes": table})
