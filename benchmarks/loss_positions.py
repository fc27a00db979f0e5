"""The output projection at every position against only the labelled ones, as JSON.

    python -m benchmarks.loss_positions [--tokens 1024] [--warmup 1] [--rounds 4] [--steps 1]
        [--output FILE] [--section.key=value ...]

Head and loss of BERT-base, forward and backward: 64,000 x 768, 15 of 100 positions labelled. Each
way has a separate process and they take turns; the peak is the increase of the process's resident
memory on a CPU, of the allocator's peak on a GPU. Then whole steps of BERT-base with 2 of its 12
layers, to which settings apply. Ratios are labelled over all, medians of the rounds.
"""

import argparse
import multiprocessing
import statistics
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection

import torch

from benchmarks.command import add_turns, benchmark_parser, positive, run_benchmark
from benchmarks.loss_memory import peak_bytes
from benchmarks.manifest import DEVICE
from benchmarks.measure import Values, Variant, measure
from titan_lite.data.packing import IGNORED
from titan_lite.training.loss import cross_entropy_sum

DIM, VOCAB, SHARE = 768, 64_000, 0.15
CONFIG = "train_configs/megatron_bert_base_512.toml"
SMALL = (
    "--model.num_layers=2",
    "--data.dataset=bundled",
    "--data.num_streams=8",
    "--data.shuffle_buffer=512",
    "--parallel.dp_replicate=1",
    "--training.local_batch_size=4",
    "--training.global_batch_size=4",
    "--training.param_dtype=float32",
    "--metrics.peak_tflops=1.0",
)


def serve(connection: Connection, selects: bool, num_chunks: int, tokens: int) -> None:
    """Sends the seconds of one forward and backward at each request, and finally the MiB."""
    torch.manual_seed(0)
    hidden = torch.randn(tokens, DIM, device=DEVICE, requires_grad=True)
    weight = torch.randn(VOCAB, DIM, device=DEVICE, requires_grad=True)
    bias = torch.zeros(VOCAB, device=DEVICE, requires_grad=True)
    labels = torch.randint(VOCAB, (tokens,), device=DEVICE)
    labels[torch.rand(tokens, device=DEVICE) >= SHARE] = IGNORED
    indices = (labels != IGNORED).nonzero().squeeze(1) if selects else None
    for parameter in (hidden, weight, bias):
        parameter.grad = torch.zeros_like(parameter)
    (hidden[:8] @ weight[:8].T).sum().backward()
    before = peak_bytes()
    while connection.recv():
        start = time.perf_counter()
        cross_entropy_sum(
            hidden,
            weight,
            bias,
            labels=labels,
            labelled_indices=indices,
            num_chunks=num_chunks,
            vocab_size=VOCAB,
        ).backward()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        connection.send(time.perf_counter() - start)
    connection.send((peak_bytes() - before) / 2**20)


def head(num_chunks: int, tokens: int, rounds: int) -> Values:
    """Measures seconds and MiB of both ways, after a warm-up round."""
    context = multiprocessing.get_context("spawn")
    connections = []
    for selects in (False, True):
        local, peer = context.Pipe()
        context.Process(target=serve, args=(peer, selects, num_chunks, tokens), daemon=True).start()
        connections.append(local)
    seconds = [
        [_request(connection, True) for connection in connections] for _ in range(1 + rounds)
    ]
    mib = [_request(connection, False) for connection in connections]
    whole, labelled = zip(*seconds[1:], strict=True)
    return {
        "chunks": num_chunks,
        "seconds": {
            "all": round(statistics.median(whole), 4),
            "labelled": round(statistics.median(labelled), 4),
        },
        "time_ratio": round(
            statistics.median(b / a for a, b in zip(whole, labelled, strict=True)), 3
        ),
        "peak_mib": {"all": round(mib[0], 1), "labelled": round(mib[1], 1)},
        "peak_ratio": round(mib[1] / mib[0], 3),
    }


def _request(connection: Connection, another: bool) -> float:
    connection.send(another)
    number: float = connection.recv()
    return number


def measured(options: argparse.Namespace) -> Values:
    """Measures whole steps, then the head alone."""
    variants = [
        Variant(way, CONFIG, (*SMALL, *options.overrides, f"--training.loss_positions={way}"))
        for way in ("all", "labelled")
    ]
    steps = measure(variants, options)
    heads = [head(chunks, options.tokens, options.rounds) for chunks in (1, 8)]
    sizes = {"tokens": options.tokens, "vocab": VOCAB, "dim": DIM, "labelled": SHARE}
    return {"head": {**sizes, "ways": heads}, "steps": steps}


def main(argv: Sequence[str] | None = None) -> int:
    parser = benchmark_parser("loss_positions", __doc__)
    parser.add_argument("--tokens", type=positive, default=1024)
    add_turns(parser, warmup=1, rounds=4, steps=1)
    return run_benchmark(parser, argv, measured, takes_overrides=True)


if __name__ == "__main__":
    sys.exit(main())
