"""Step time, WPS, MFU and peak memory of a run, or of two side by side, as JSON.

    python -m benchmarks.step CONFIG [--vs CONFIG] [--nproc N] [--warmup 6] [--rounds 10]
        [--steps 2] [--profile] [--output FILE] [--section.key=value ...]
        [--a.section.key=value ...] [--b.section.key=value ...]

With --vs the two, a and b, take turns of `steps` steps, each in N separate processes (NCCL on GPUs,
gloo on CPU); overrides that start with a. or b. are for one of them. Ratios are b over a, round by
round. --profile adds the share of the step in which no kernel ran. FILE is kept in
benchmarks/results/.
"""

import argparse
import sys
from collections.abc import Sequence

from benchmarks.command import add_turns, benchmark_parser, positive, run_benchmark
from benchmarks.idle import kernel_time, with_idle_share
from benchmarks.measure import Values, Variant, measure
from benchmarks.workers import BenchmarkError


def main(argv: Sequence[str] | None = None) -> int:
    parser = benchmark_parser("step", __doc__)
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("--vs", metavar="CONFIG")
    parser.add_argument("--nproc", type=positive, default=1, metavar="N")
    parser.add_argument("--profile", action="store_true")
    add_turns(parser, warmup=6, rounds=10, steps=2)
    return run_benchmark(parser, argv, measured, takes_overrides=True)


def measured(options: argparse.Namespace) -> list[Values]:
    """Measures the sides, with --profile the share without a kernel as well."""
    variants = sides(options.config, options.vs, options.nproc, options.overrides)
    results = measure(variants, options, extra=kernel_time if options.profile else None)
    return [with_idle_share(result) for result in results] if options.profile else results


def sides(config: str, vs: str | None, nproc: int, overrides: Sequence[str]) -> list[Variant]:
    """Returns the one or two variants that the arguments name."""
    configs = {"a": config} if vs is None else {"a": config, "b": vs}
    settings: dict[str, list[str]] = {side: [] for side in configs}
    for override in overrides:
        side, _, rest = override.removeprefix("--").partition(".")
        if side in configs:
            settings[side].append(f"--{rest}")
        elif side == "b":
            raise BenchmarkError(f"{override} is for side b, which --vs CONFIG adds")
        else:
            for both in settings.values():
                both.append(override)
    return [Variant(side, config, tuple(settings[side]), nproc) for side, config in configs.items()]


if __name__ == "__main__":
    sys.exit(main())
