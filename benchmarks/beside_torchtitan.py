"""Step time and peak memory of titan_lite over torchtitan's: same model, batch, dtype, processes.

    python -m benchmarks.beside_torchtitan [CONFIG] [--packages FOLDER] [--nproc 2]
        [--dtypes bfloat16 float32] [--modes eager compile] [--warmup 4] [--rounds 8] [--steps 4]
        [--output FILE] [--section.key=value ...]

Both sides have separate processes and take turns of `steps` steps, alternating which is first; a
ratio is of one round. Each reads the bundled corpus by its own data pipeline. CONFIG is a model of
the llama family, by default torchtitan's debug model. torchtitan 0.2.2 is installed into FOLDER, by
default outputs/torchtitan, unless it is there; torch is the same on both sides. On a CPU,
torchtitan is patched to run there, and CPU seconds are measured, too: those of the process's
threads. On a GPU both models must fit at once.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import measure, torchtitan_side
from benchmarks.command import add_turns, benchmark_parser, positive, run_benchmark
from benchmarks.manifest import DEVICE
from benchmarks.measure import Values, Variant, spread
from benchmarks.workers import BenchmarkError, Group
from titan_lite.metrics.device import DeviceMemory
from titan_lite.models.plan import make_plan

OURS, THEIRS = "titan_lite", "torchtitan"
# Requirements that titan_lite does not have. triton is imported, but not used on a CPU.
PACKAGES = (
    "torchtitan==0.2.2",
    "tyro",
    "torchdata",
    "docstring_parser",
    "typeguard",
    "shtab",
    "einops",
)
TORCHTITAN_DEBUG = (
    "--model.num_layers=6",
    "--model.num_heads=16",
    "--model.num_kv_heads=16",
    "--training.seq_len=512",
    "--training.local_batch_size=4",
)
MODES = {"eager": (), "compile": ("--compile.enable=true",)}


def install(folder: Path) -> None:
    """Installs torchtitan and its requirements into the folder, unless they are there."""
    if (folder / "torchtitan").exists():
        return
    print(f"Installing {PACKAGES[0]} into {folder}", file=sys.stderr)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    triton = [] if torch.version.cuda else ["triton"]
    if subprocess.run([*pip, *PACKAGES, *triton], check=False).returncode:
        raise BenchmarkError(f"torchtitan could not be installed into {folder}")


def timed(turn: Callable[[], Any]) -> Values:
    """Runs a turn of this process; returns wall seconds, CPU seconds and peak memory."""
    dist.barrier()
    begin, cpu_begin = time.perf_counter(), time.process_time()
    record = turn()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return {
        "seconds": time.perf_counter() - begin,
        "cpu_seconds": time.process_time() - cpu_begin,
        # The Trainer's record has the peak of its turn, which it resets.
        "memory_gib": (record or DeviceMemory(DEVICE).snapshot())["memory_gib"],
    }


def race(options: argparse.Namespace, dtype: str, mode: str, folder: str) -> Values:
    """Measures both sides in one dtype, eager or compiled."""
    settings = (*options.overrides, f"--training.param_dtype={dtype}", *MODES[mode])
    variant = Variant(OURS, options.config, settings, options.nproc)
    run = variant.settings(f"{folder}/{OURS}", options.steps)
    config = make_plan(options.config, run, options.nproc).config
    warmup = -(-options.warmup // options.steps)
    turns = {OURS: measure.take_turn, THEIRS: torchtitan_side.take_turn}
    with Group(options.nproc) as local, Group(options.nproc) as peer:
        local.call(measure.start, options.config, run, options.steps, warmup)
        packages = str(options.packages.absolute())
        peer_parameters, *_ = peer.call(
            torchtitan_side.start, packages, f"{folder}/{THEIRS}", config, options.steps
        )
        for _ in range(warmup):
            peer.call(torchtitan_side.take_turn)
        groups = {OURS: local, THEIRS: peer}
        rounds: list[dict[str, Values]] = []
        for number in range(options.rounds):
            order = list(groups)[:: 1 if number % 2 == 0 else -1]
            rounds.append(
                {side: over_ranks(groups[side].call(timed, turns[side])) for side in order}
            )
        local_parameters = local.call(measure.finish)[0]["parameters"]
        peer.call(torchtitan_side.finish)
    if local_parameters != peer_parameters:
        raise BenchmarkError(
            f"{OURS} has {local_parameters:,} parameters, {THEIRS} {peer_parameters:,}"
        )
    return {
        "dtype": dtype,
        "mode": mode,
        "config": options.config,
        "with": list(settings),
        "parameters": local_parameters,
        "processes": options.nproc,
        "threads_per_process": local.threads,
        **compared(rounds, options.steps),
    }


def over_ranks(ranks: Sequence[Values]) -> Values:
    """Sums the CPU seconds of all ranks, and takes the maximum of their other measurements."""
    return {
        key: sum(values) if key == "cpu_seconds" else max(values)
        for key, values in ((key, [rank[key] for rank in ranks]) for key in ranks[0])
    }


def compared(rounds: Sequence[dict[str, Values]], steps: int) -> Values:
    """Returns the ratios of the rounds, and both sides' seconds per step and peak memory."""
    results: Values = {"rounds": rounds}
    for key in ("seconds", "cpu_seconds"):
        ratios = [sides[OURS][key] / sides[THEIRS][key] for sides in rounds]
        results[f"{key}_over_torchtitan"] = spread(ratios)
        for side in (OURS, THEIRS):
            per_step = spread([sides[side][key] / steps for sides in rounds])
            results.setdefault(side, {})[f"{key}_per_step"] = per_step
    for side in (OURS, THEIRS):
        results[side]["peak_memory_gib"] = round(max(s[side]["memory_gib"] for s in rounds), 3)
    local, peer = (results[side]["peak_memory_gib"] for side in (OURS, THEIRS))
    return results | {"peak_memory_over_torchtitan": round(local / peer, 3)}


def measured(options: argparse.Namespace) -> Iterator[Values]:
    """Yields the ratios of each dtype and mode."""
    if options.config is None:
        options.config = "train_configs/debug.toml"
        options.overrides = [*TORCHTITAN_DEBUG, *options.overrides]
    install(options.packages)
    for dtype in options.dtypes:
        for mode in options.modes:
            with tempfile.TemporaryDirectory() as folder:
                yield race(options, dtype, mode, folder)


def main(argv: Sequence[str] | None = None) -> int:
    parser = benchmark_parser("beside_torchtitan", __doc__)
    parser.add_argument("config", nargs="?")
    parser.add_argument("--packages", type=Path, default=Path("outputs/torchtitan"))
    parser.add_argument("--nproc", type=positive, default=2)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    add_turns(parser, warmup=4, rounds=8, steps=4)
    return run_benchmark(parser, argv, measured, takes_overrides=True)


if __name__ == "__main__":
    sys.exit(main())
