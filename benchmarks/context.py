"""Step time and activation memory of context parallel as the sequence grows 1x, 2x, 4x.

    python -m benchmarks.context [CONFIG] [--seq-len 1024] [--degrees 1 2 4] [--methods ring ...]
        [--warmup 2] [--rounds 4] [--steps 2] [--output FILE] [--section.key=value ...]

One sequence per step, on as many processes as the degree; the degrees of one length take turns,
and ratios are to the first of them. Activation memory is the memory of forward and backward on one
rank without weights, gradients and optimizer state, but with gathered weights and attention's
received tensors: the allocator's peak on CUDA, the profiler's on the CPU.
"""

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.command import add_turns, benchmark_parser, positive, run_benchmark
from benchmarks.manifest import DEVICE
from benchmarks.measure import Values, Variant, forward_and_backward, measure

METHODS = ("ring", "all_gather", "ulysses")


def activation_memory() -> Values:
    """Returns the peak MiB of one forward and backward beyond those allocated before it."""
    forward_and_backward()  # Allocates the gradients.
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        forward_and_backward()
        peak = torch.cuda.max_memory_allocated() - held
    else:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            forward_and_backward()
        kineto = profiler.profiler
        assert kineto is not None
        assert kineto.kineto_results is not None
        events = [e for e in kineto.kineto_results.events() if e.name() == "[memory]"]
        events.sort(key=lambda event: event.start_ns())
        peak = max(itertools.accumulate(event.nbytes() for event in events))
    return {"activation_mib": round(peak / 2**20, 1)}


def variants(
    config: str, seq_len: int, degrees: Sequence[int], methods: Sequence[str], rest: Sequence[str]
) -> list[Variant]:
    """Returns a variant with one sequence of `seq_len` tokens for each degree and method."""
    variants_by_degree = []
    for degree in degrees:
        for method in methods if degree > 1 else [""]:
            settings = {
                "training.seq_len": seq_len,
                "training.local_batch_size": 1,
                "training.global_batch_size": 1,
                "parallel.cp": degree,
                **({"parallel.cp_method": method} if method else {}),
            }
            overrides = (*(f"--{key}={value}" for key, value in settings.items()), *rest)
            name = " ".join(filter(None, (f"{seq_len} tokens, cp {degree}", method)))
            variants_by_degree.append(Variant(name, config, overrides, nproc=degree))
    return variants_by_degree


def measured(options: argparse.Namespace) -> Iterator[Values]:
    """Yields the results of each length, whose variants take turns."""
    overrides = [f"--model.max_seq_len={4 * options.seq_len}", *options.overrides]
    for factor in (1, 2, 4):
        of_length = variants(
            options.config, factor * options.seq_len, options.degrees, options.methods, overrides
        )
        yield from measure(of_length, options, extra=activation_memory)


def main(argv: Sequence[str] | None = None) -> int:
    parser = benchmark_parser("context", __doc__)
    parser.add_argument("config", nargs="?", default="train_configs/debug.toml")
    parser.add_argument("--seq-len", type=positive, default=1024, help="the shortest, in tokens")
    parser.add_argument("--degrees", type=positive, nargs="+", default=[1, 2, 4])
    parser.add_argument("--methods", nargs="+", default=["ring"], choices=METHODS)
    add_turns(parser, warmup=2, rounds=4, steps=2)
    return run_benchmark(parser, argv, measured, takes_overrides=True)


if __name__ == "__main__":
    sys.exit(main())
