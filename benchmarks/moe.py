"""The cost of a Mixture of Experts, in four comparisons whose two sides take turns.

    python -m benchmarks.moe [--dtypes float32 bfloat16] [--batch 8] [--seq-len 256] [--warmup 4]
        [--rounds 12] [--steps 2] [--output FILE] [--section.key=value ...]

`step`: the step of train_configs/debug_moe.toml over that of a dense model of equal active
parameters, whose feed-forward is as wide as a token's experts together; `ep`: of expert parallel
over 2 processes over that of FSDP over the same 2; `grouped`: forward and backward of one block's
experts in grouped products over a loop of the experts, with their rows drawn at random;
`transformers`: tokens per second of the debug flavor over those of transformers' own class, in the
same bare loop (as benchmarks.families). Ratios are by round. FILE is kept in benchmarks/results/.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from benchmarks.bare_loop import OURS, THEIRS
from benchmarks.command import add_turns, benchmark_parser, positive, run_benchmark
from benchmarks.families import AGREE, race
from benchmarks.manifest import DEVICE
from benchmarks.measure import Values, Variant, measure, spread
from benchmarks.workers import Group
from titan_lite.models.args import MoEArgs
from titan_lite.models.plan import make_plan
from titan_lite.nn.moe import GroupedSwiGLU
from titan_lite.planner.counts import num_inactive_params, num_params

CONFIG = "train_configs/debug_moe.toml"
# Keys of [model] that a dense Qwen 3 has as well.
SHARED = ("dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "vocab_size", "max_seq_len")


def moe_args(overrides: Sequence[str]) -> MoEArgs:
    """Returns the numbers of the model that is measured."""
    args = make_plan(CONFIG, list(overrides), 1).args
    assert isinstance(args, MoEArgs)
    return args


def dense(args: MoEArgs, overrides: Sequence[str]) -> tuple[str, ...]:
    """Returns the settings of a dense model with as many active parameters, less the router's."""
    others = [override for override in overrides if not override.startswith("--model.")]
    numbers = {name: getattr(args, name) for name in SHARED}
    numbers["ffn_dim"] = args.top_k * args.ffn_dim
    return (*others, "--model.name=qwen3", *(f"--model.{k}={v}" for k, v in numbers.items()))


class LoopSwiGLU(nn.Module):
    """The same as GroupedSwiGLU, one expert after the other."""

    def forward(
        self, x_RD: Tensor, ends_E: Tensor, w1_EHD: Tensor, w2_EDH: Tensor, w3_EHD: Tensor
    ) -> Tensor:
        outputs = []
        for expert, rows in enumerate(pairwise([0, *ends_E.tolist()])):
            x = x_RD[slice(*rows)]
            h = silu(linear(x, w1_EHD[expert])) * linear(x, w3_EHD[expert])
            outputs.append(linear(h, w2_EDH[expert]))
        return torch.cat(outputs)


SIDES: dict[str, nn.Module] = {"grouped": GroupedSwiGLU(), "loop": LoopSwiGLU()}


def race_products(args: MoEArgs, dtype: str, options: Any) -> Values:
    """Measures seconds of both sides' forward and backward in this process, and their ratio."""
    generator = torch.Generator().manual_seed(0)
    E, D, H = args.num_experts, args.dim, args.ffn_dim
    rows = options.batch * options.seq_len * args.top_k
    chosen = torch.randint(E, (rows,), generator=generator)
    ends_E = torch.bincount(chosen, minlength=E).cumsum(0).to(DEVICE, torch.int32)

    def drawn(*shape: int) -> Tensor:
        values = torch.randn(*shape, generator=generator) / shape[-1] ** 0.5
        return values.to(DEVICE, getattr(torch, dtype)).requires_grad_()

    inputs = [drawn(rows, D), drawn(E, H, D), drawn(E, D, H), drawn(E, H, D)]
    grad = torch.ones_like(inputs[0])

    def turn(side: str, count: int) -> float:
        begin = time.perf_counter()
        for _ in range(count):
            x, *weights = inputs
            torch.autograd.grad(SIDES[side](x, ends_E, *weights), inputs, grad)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - begin) / count

    outputs = [side(inputs[0], ends_E, *inputs[1:]) for side in SIDES.values()]
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-5 if dtype == "float32" else 0.05)
    for side in SIDES:
        turn(side, options.warmup)
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(options.rounds):
        for side, taken in seconds.items():
            taken.append(turn(side, options.steps))
    pairs = zip(seconds["grouped"], seconds["loop"], strict=True)
    return {
        "comparison": "grouped",
        "dtype": dtype,
        "rows": rows,
        "seconds": {side: spread(taken) for side, taken in seconds.items()},
        "over_loop": spread([grouped / loop for grouped, loop in pairs]),
    }


def compare(options: argparse.Namespace) -> list[Values]:
    """Makes all comparisons, each in separate processes."""
    overrides = (
        *options.overrides,
        f"--training.local_batch_size={options.batch}",
        f"--training.seq_len={options.seq_len}",
    )
    args = moe_args(overrides)
    results: list[Values] = []
    for dtype in options.dtypes:
        settings = (*overrides, f"--training.param_dtype={dtype}")
        with_dense = [
            Variant("dense", CONFIG, dense(args, settings)),
            Variant("experts", CONFIG, settings),
        ]
        degrees = [
            Variant("ep 1", CONFIG, settings, 2),
            Variant("ep 2", CONFIG, (*settings, "--parallel.ep=2"), 2),
        ]
        for name, variants in (("step", with_dense), ("ep", degrees)):
            for variant, result in zip(variants, measure(variants, options), strict=True):
                model = make_plan(CONFIG, list(variant.overrides), variant.nproc).args
                active = num_params(model) - num_inactive_params(model)
                results.append(
                    {"comparison": name, "dtype": dtype, "active_parameters": active, **result}
                )
        with Group(1) as group:
            results += group.call(race_products, args, dtype, options)
        with Group(1) as local, Group(1) as peer:
            raced = race({OURS: local, THEIRS: peer}, "qwen3_moe", dtype, options)
            results.append({"comparison": "transformers", **raced})
    return results


def main(argv: Sequence[str] | None = None) -> int:
    parser = benchmark_parser("moe", __doc__)
    parser.add_argument("--dtypes", nargs="+", choices=AGREE, default=list(AGREE))
    parser.add_argument("--batch", type=positive, default=8, help="samples of a step")
    parser.add_argument("--seq-len", type=positive, default=256, help="in tokens")
    add_turns(parser, warmup=4, rounds=12, steps=2)
    return run_benchmark(parser, argv, compare, takes_overrides=True)


if __name__ == "__main__":
    sys.exit(main())
