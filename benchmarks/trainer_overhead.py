"""Step time of the Trainer over a bare PyTorch loop: same model, weights, optimizer and batches.

    python -m benchmarks.trainer_overhead [CONFIG] [--nproc N] [--dtypes float32 bfloat16]
        [--same-loss] [--warmup 5] [--rounds 8] [--steps 5] [--output FILE]
        [--section.key=value ...]

Within the same processes the two take turns of `steps` steps; ratios are by round. In one process
the bare loop is a plain module, under autocast in bfloat16; in several it calls fully_shard with
the Trainer's units and policy. Its loss is torch's cross_entropy, or with --same-loss the
library's chunked one, so that only the Trainer's own cost differs. In float32 the two losses must
agree.
"""

import argparse
import contextlib
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional as F

from benchmarks.command import add_turns, benchmark_parser, positive, run_benchmark
from benchmarks.manifest import DEVICE
from benchmarks.measure import (
    Run,
    Values,
    Variant,
    finish,
    spread,
    start,
    take_turn,
)
from benchmarks.workers import BenchmarkError, Group
from titan_lite.models.registry import resolve
from titan_lite.nn.build_model import build_model
from titan_lite.nn.decoder import Decoder
from titan_lite.optim.schedule import lr_factor
from titan_lite.training.loss import cross_entropy_sum
from titan_lite.training.trainer import Trainer


def shard(model: Decoder, dtype: torch.dtype) -> None:
    """Shards with the units and resharding of parallel/fsdp.py, and FSDP2's defaults otherwise."""
    mesh = init_device_mesh(DEVICE.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    blocks: list[Any] = list(model.layers.children())
    for module in (model.tok_embeddings, *blocks[:-1]):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    for kept in (blocks[-1], [model.norm, model.output], model):
        fully_shard(kept, mesh=mesh, mp_policy=policy, reshard_after_forward=False)


def bare_loop(trainer: Trainer, dtype: torch.dtype, same_loss: bool) -> Callable[[int], Tensor]:
    """Runs a step on the trainer's first batches and weights; returns the loss."""
    config, device = trainer.plan.config, trainer.process.device
    ranks = trainer.process.world_size
    model = build_model(*resolve(config.model)).to(device)
    model.load_state_dict({n: p.full_tensor() for n, p in trainer.built.model.named_parameters()})
    cast: Any = contextlib.nullcontext()
    if ranks > 1:
        shard(model, dtype)
    elif dtype != torch.float32:
        cast = torch.autocast(device.type, dtype)
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
    batches = iter(trainer.data.build_loader())

    def mean_loss(model: Decoder, inputs: Tensor, labels: Tensor) -> Tensor:
        if not same_loss:
            logits = model(inputs)
            return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        head_loss = partial(
            cross_entropy_sum,
            labels=labels,
            num_chunks=config.training.loss_chunks,
            vocab_size=trainer.plan.args.vocab_size,
        )
        return model(inputs, head_loss=head_loss) / labels.numel()

    def step(number: int) -> Tensor:
        batch = next(batches)
        inputs, labels = batch.inputs.to(device), batch.labels.to(device)
        with cast:
            loss = mean_loss(model, inputs, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.training.max_norm)
        factor = lr_factor(number, config.lr_scheduler, config.training.steps)
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * factor
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def alternate(config: str, overrides: list[str], options: argparse.Namespace, dtype: str) -> Values:
    """Measures the ratios of one dtype in each process."""
    steps, warmup_rounds = options.steps, math.ceil(options.warmup / options.steps)
    start(config, overrides, steps, 0)
    bare = bare_loop(Run.trainer, getattr(torch, dtype), options.same_loss)

    def bare_turn() -> float:
        first = Run.step - steps + 1
        for number in range(first, first + steps):
            loss = bare(number)
        if dist.get_world_size() > 1:
            dist.all_reduce(loss)
        return loss.item() / dist.get_world_size()

    ratios, seconds, differences = [], [], []
    for number in range(-warmup_rounds, options.rounds):
        trainer_seconds, record = timed(take_turn)
        bare_seconds, loss = timed(bare_turn)
        differences.append(abs(record["loss"] - loss) / loss)
        if number >= 0:
            ratios.append(trainer_seconds / bare_seconds)
            seconds.append(bare_seconds / steps)
    finish()
    return {
        "dtype": dtype,
        "processes": dist.get_world_size(),
        "threads_per_process": torch.get_num_threads(),
        "bare_loop": "fully_shard" if dist.get_world_size() > 1 else "plain",
        "bare_loss": "cross_entropy_sum" if options.same_loss else "F.cross_entropy",
        "trainer_over_bare_loop": spread(ratios),
        "bare_step_seconds": round(statistics.median(seconds), 4),
        "largest_relative_loss_difference": max(differences),
    }


def timed(turn: Callable[[], Any]) -> tuple[float, Any]:
    """Returns seconds and result; both kinds of turn end with the host reading the loss."""
    dist.barrier()
    begin = time.perf_counter()
    result = turn()
    return time.perf_counter() - begin, result


def measured(options: argparse.Namespace) -> Iterator[Values]:
    """Yields the ratios of each dtype."""
    if options.same_loss and options.nproc == 1:
        raise BenchmarkError(
            "--same-loss is for --nproc 2 or more: autocast does not reach into that loss"
        )
    for dtype in options.dtypes:
        settings = (*options.overrides, f"--training.param_dtype={dtype}")
        variant = Variant(dtype, options.config, settings, options.nproc)
        with tempfile.TemporaryDirectory() as folder, Group(options.nproc) as group:
            run = variant.settings(folder, options.steps)
            yield group.call(alternate, options.config, run, options, dtype)[0]


def main(argv: Sequence[str] | None = None) -> int:
    parser = benchmark_parser("trainer_overhead", __doc__)
    parser.add_argument("config", nargs="?", default="train_configs/debug.toml")
    parser.add_argument("--nproc", type=positive, default=1)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--same-loss", action="store_true")
    add_turns(parser, warmup=5, rounds=8, steps=5)
    return run_benchmark(parser, argv, measured, takes_overrides=True)


if __name__ == "__main__":
    sys.exit(main())
