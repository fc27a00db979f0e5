"""The rates that a device reaches: a square bfloat16 matmul, short and sustained, and a copy.

    python -m benchmarks.ceilings [--size 8192] [--copy-mb 4096] [--seconds 5] [--output FILE]

--seconds is the time of the sustained matmul, whose rate is measured at its end: a warm card is
slower than a cold one.
"""

import argparse
import sys
from collections.abc import Callable, Sequence

import torch
from torch.utils.benchmark import Measurement, Timer

from benchmarks.command import benchmark_parser, positive, run_benchmark
from benchmarks.manifest import DEVICE
from benchmarks.measure import Values


def timed(function: Callable[[], object], seconds: float = 0.3) -> Measurement:
    """Returns the seconds of a call, measured over blocks of calls for about `seconds`."""
    timer = Timer("function()", globals={"function": function})
    timer.timeit(3)
    return timer.blocked_autorange(min_run_time=seconds)


def ceilings(size: int, copy_mb: int, seconds: float) -> Values:
    """Measures TFLOP/s of matmuls and TB/s of a copy, which reads and writes each byte once."""
    a, b = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    tflop = 2 * size**3 / 1e12
    short = timed(lambda: a @ b).median
    sustained = timed(lambda: a @ b, seconds).times[-1]
    source = torch.zeros(copy_mb * 2**20, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    copy = timed(lambda: target.copy_(source)).median
    return {
        "matmul_size": size,
        "matmul_tflops": tflop / short,
        "sustained_matmul_tflops": tflop / sustained,
        "copy_mb": copy_mb,
        "copy_tbytes_per_s": 2 * source.nbytes / copy / 1e12,
    }


def measured(options: argparse.Namespace) -> Values:
    """Measures all rates."""
    return ceilings(options.size, options.copy_mb, options.seconds)


def main(argv: Sequence[str] | None = None) -> int:
    parser = benchmark_parser("ceilings", __doc__)
    parser.add_argument("--size", type=positive, default=8192)
    parser.add_argument("--copy-mb", type=positive, default=4096)
    parser.add_argument("--seconds", type=float, default=5.0)
    return run_benchmark(parser, argv, measured)


if __name__ == "__main__":
    sys.exit(main())
