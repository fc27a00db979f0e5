"""Step time and peak activation memory of each mode of activation checkpointing, side by side.

    python -m benchmarks.activation_checkpoint [CONFIG] [--modes none full ...] [--warmup 2]
        [--rounds 10] [--steps 1] [--output FILE] [--section.key=value ...]

One process per mode, since the compiler's memory budget is a process's; ratios are to the first
mode. Activation memory is the memory of forward and backward without weights, gradients and
optimizer state: on CUDA the allocator's peak, on the CPU that of torch's MemTracker, which does
not see inside compiled blocks: for those, the tensors saved for backward.
"""

import argparse
import sys
from collections.abc import Sequence

import torch
from torch.distributed._tools.mem_tracker import MemTracker

from benchmarks.command import add_turns, benchmark_parser, run_benchmark
from benchmarks.manifest import DEVICE
from benchmarks.measure import Run, Values, Variant, forward_and_backward, measure

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


def activation_memory() -> Values:
    """Returns the MiB of one forward and backward, and their kind: the peak or saved tensors."""
    saved = Run.trainer.plan.config.compile.enable and DEVICE.type == "cpu"
    mib = (saved_bytes() if saved else peak_bytes()) / 2**20
    return {"activation_mib": round(mib, 2), "activation_memory": "saved" if saved else "peak"}


def peak_bytes() -> int:
    """Returns the peak bytes beyond those allocated before and after."""
    forward_and_backward()  # Allocates the gradients.
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        forward_and_backward()
        return torch.cuda.max_memory_allocated() - held
    with MemTracker() as tracker:
        tracker.track_external(Run.trainer.built.model)
        forward_and_backward()
    peak, after = (tracker.get_tracker_snapshot(when)[DEVICE] for when in ("peak", "current"))
    return int(peak["Total"] - after["Total"])


def saved_bytes() -> int:
    """Returns the bytes of the distinct storages that autograd keeps from forward to backward."""
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward_and_backward()
    return sum(storage.nbytes() for storage in storages.values())


def measured(options: argparse.Namespace) -> list[Values]:
    """Measures the modes side by side."""
    variants = [
        Variant(
            mode,
            options.config,
            (
                *options.overrides,
                f"--compile.enable={str(mode in COMPILED).lower()}",
                *(f"--activation_checkpoint.{setting}" for setting in MODES[mode]),
            ),
        )
        for mode in options.modes
    ]
    return measure(variants, options, extra=activation_memory)


def main(argv: Sequence[str] | None = None) -> int:
    parser = benchmark_parser("activation_checkpoint", __doc__)
    parser.add_argument("config", nargs="?", default="train_configs/debug.toml")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    add_turns(parser, warmup=2, rounds=10, steps=1)
    return run_benchmark(parser, argv, measured, takes_overrides=True)


if __name__ == "__main__":
    sys.exit(main())
