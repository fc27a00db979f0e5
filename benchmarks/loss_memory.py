"""Peak memory and time of the output projection and cross-entropy, forward and backward.

    python -m benchmarks.loss_memory [--tokens 2048] [--vocab 32000] [--dim 512]

Each way runs in a separate process; the peak is the increase of the process's resident memory on a
CPU, of the allocator's peak on a GPU. Times are medians of 5 after a warm-up, ratios are over the
plain way.
"""

import argparse
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.command import benchmark_parser, positive, run_benchmark
from benchmarks.manifest import DEVICE
from benchmarks.measure import Values
from titan_lite.training.loss import cross_entropy_sum

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.T).float(), labels, reduction="sum")


def chunked(num_chunks: int) -> Loss:
    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy_sum(
            hidden, weight, labels=labels, num_chunks=num_chunks, vocab_size=len(weight)
        )

    return loss


WAYS: dict[str, Loss] = {
    "plain": plain,
    "chunked 1": chunked(1),
    "chunked 8": chunked(8),
    "chunked 32": chunked(32),
}
if hasattr(F, "linear_cross_entropy"):
    WAYS["torch linear_cross_entropy"] = lambda h, w, labels: F.linear_cross_entropy(
        h, w, labels, reduction="sum"
    )


def peak_bytes() -> int:
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(way: str, dtype: torch.dtype, tokens: int, vocab: int, dim: int) -> tuple[float, float]:
    """Returns (seconds, MiB) of one forward and backward."""
    hidden = torch.randn(tokens, dim, device=DEVICE, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab, dim, device=DEVICE, dtype=dtype, requires_grad=True)
    labels = torch.randint(vocab, (tokens,), device=DEVICE)
    hidden.grad, weight.grad = torch.zeros_like(hidden), torch.zeros_like(weight)
    (hidden[:8] @ weight[:8].T).sum().backward()
    before, seconds = peak_bytes(), []
    for _ in range(6):
        start = time.perf_counter()
        WAYS[way](hidden, weight, labels).backward()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:]), (peak_bytes() - before) / 2**20


def measured(options: argparse.Namespace) -> Values:
    """Measures each way, over the plain one."""
    sizes = (options.tokens, options.vocab, options.dim)
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        for way in WAYS:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                seconds, mib = pool.apply(measure, (way, dtype, *sizes))
            if way == "plain":
                plain_seconds, plain_mib = seconds, mib
            results.append(
                {
                    "dtype": str(dtype).removeprefix("torch."),
                    "way": way,
                    "peak_mib": round(mib, 1),
                    "peak_over_plain": round(mib / plain_mib, 3),
                    "seconds": round(seconds, 4),
                    "time_over_plain": round(seconds / plain_seconds, 3),
                }
            )
    return {"tokens, vocab, dim": sizes, "ways": results}


def main(argv: Sequence[str] | None = None) -> int:
    parser = benchmark_parser("loss_memory", __doc__)
    parser.add_argument("--tokens", type=positive, default=2048)
    parser.add_argument("--vocab", type=positive, default=32_000)
    parser.add_argument("--dim", type=positive, default=512)
    return run_benchmark(parser, argv, measured)


if __name__ == "__main__":
    sys.exit(main())
