"""Forward and backward of causal attention by each of torch's kernels, whole and in documents.

    python -m benchmarks.attention [--seq-len 8192] [--heads 32 8] [--head-dim 128]
        [--documents 1 20 200] [--output FILE]

One sequence in bfloat16; --heads are those of queries and of keys and values. "default" is the
choice of scaled_dot_product_attention. With documents, the maximum length passed to torch's
variable-length attention is that of the sequence, or that of the longest document, rounded up to a
power of two. A kernel that cannot run is reported as failed.
"""

import argparse
import inspect
import itertools
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

from benchmarks.ceilings import timed
from benchmarks.command import benchmark_parser, positive, run_benchmark
from benchmarks.manifest import DEVICE
from benchmarks.measure import Values

KERNELS = {
    "default": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
}
# torch 2.11 takes any number of key/value heads without this argument.
GQA = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def whole(backend: SDPBackend | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Computes attention of (1, heads, tokens, head dim) with a kernel; None: torch's choice."""
    with nullcontext() if backend is None else sdpa_kernel(backend):
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def in_documents(starts: Tensor, longest: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Computes attention of (tokens, heads, head dim) within documents."""
    out: Any = varlen_attn(q, k, v, starts, starts, longest, longest, window_size=(-1, 0), **GQA)
    return out


def document_starts(seq_len: int, documents: int) -> list[int]:
    """Returns starts of documents with random but fixed lengths, and the end of the last."""
    return [0, *sorted(random.Random(0).sample(range(1, seq_len), documents - 1)), seq_len]


def cases(
    seq_len: int, heads: Sequence[int], head_dim: int, documents: Sequence[int]
) -> Iterator[Values]:
    """Yields one result per kernel and way of calling it."""
    q, k, v = (
        torch.randn(1, n, seq_len, head_dim, device=DEVICE, dtype=torch.bfloat16)
        for n in (heads[0], heads[1], heads[1])
    )
    for name, backend in KERNELS.items():
        yield timed_case(name, partial(whole, backend), (q, k, v), heads[0] * seq_len**2)
    rows = [tensor[0].transpose(0, 1).contiguous() for tensor in (q, k, v)]
    for count in documents:
        starts = document_starts(seq_len, count)
        lengths = [end - start for start, end in itertools.pairwise(starts)]
        rounded = 1 << (max(lengths) - 1).bit_length()
        on_device = torch.tensor(starts, dtype=torch.int32, device=DEVICE)
        for longest in sorted({seq_len, min(rounded, seq_len)}, reverse=True):
            name = f"varlen, {count} documents, longest {longest}"
            attend = partial(in_documents, on_device, longest)
            yield timed_case(name, attend, rows, heads[0] * sum(n * n for n in lengths))


def timed_case(
    name: str, attend: Callable[..., Tensor], inputs: Sequence[Tensor], pairs: int
) -> Values:
    """Returns milliseconds, TFLOP/s, with half of `pairs` under a causal mask, and the kernel."""
    inputs = [tensor.requires_grad_() for tensor in inputs]

    def run() -> None:
        out = attend(*inputs)
        torch.autograd.grad(out, inputs, out)

    activity = ProfilerActivity.CUDA if DEVICE.type == "cuda" else ProfilerActivity.CPU
    try:
        with profile(activities=[activity]) as profiler:
            run()
        seconds = timed(run).median
    except (RuntimeError, NotImplementedError) as error:
        return {"case": name, "failed": str(error).strip().split(". ")[0]}
    own = f"self_{'device' if DEVICE.type == 'cuda' else 'cpu'}_time_total"
    longest = max(profiler.key_averages(), key=lambda event: getattr(event, own))
    # Two matrix products forward and five backward.
    tflop = 7 * pairs * inputs[0].shape[-1] / 1e12
    return {
        "case": name,
        "ms": 1000 * seconds,
        "tflops": tflop / seconds,
        "longest_kernel": longest.key,
    }


def measured(options: argparse.Namespace) -> Iterator[Values]:
    """Yields the results, one by one."""
    return cases(options.seq_len, options.heads, options.head_dim, options.documents)


def main(argv: Sequence[str] | None = None) -> int:
    parser = benchmark_parser("attention", __doc__)
    parser.add_argument("--seq-len", type=positive, default=8192)
    parser.add_argument("--heads", type=positive, nargs=2, default=[32, 8])
    parser.add_argument("--head-dim", type=positive, default=128)
    parser.add_argument("--documents", type=positive, nargs="+", default=[1, 20, 200])
    return run_benchmark(parser, argv, measured)


if __name__ == "__main__":
    sys.exit(main())
