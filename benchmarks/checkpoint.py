"""The cost of saving and resuming for every checkpoint.async_mode, as JSON.

    python -m benchmarks.checkpoint [CONFIG] [--nproc N] [--saves 3] [--interval 8]
        [--modes disabled async async_pinned] [--folder DIR] [--output FILE]
        [--section.key=value ...]

Each mode trains a separate run that saves every `interval` steps below DIR, after `interval` steps
without a save. Then a plain file of the size of each rank's share is written to the same disk, and
the run is resumed from files that are no longer in the page cache. FILE is kept in
benchmarks/results/.

blocked_over_step: seconds that training waited for a save, over the median step without one.
lost_over_step: the same, plus the slowdown of steps while a save was in progress.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import get_args

import torch.distributed as dist

from benchmarks.command import benchmark_parser, positive, run_benchmark
from benchmarks.measure import Values
from benchmarks.workers import Group
from titan_lite.checkpoint.agreement import agree_on_start
from titan_lite.checkpoint.manifest import read_manifest
from titan_lite.checkpoint.state import find_start
from titan_lite.config.load import load_config
from titan_lite.config.schema import AsyncMode
from titan_lite.metrics.record import Record
from titan_lite.models.plan import make_plan
from titan_lite.runtime.distributed import Process
from titan_lite.training.open_run import open_run
from titan_lite.training.trainer import Trainer

CONFIG = "benchmarks/configs/llama_104m.toml"
BLOCK = 16 * 2**20


def main(argv: Sequence[str] | None = None) -> int:
    parser = benchmark_parser("checkpoint", __doc__)
    parser.add_argument("config", metavar="CONFIG", nargs="?", default=CONFIG)
    parser.add_argument("--nproc", type=positive, default=1, metavar="N")
    parser.add_argument("--saves", type=positive, default=3, metavar="N")
    parser.add_argument("--interval", type=positive, default=8, metavar="STEPS")
    modes = get_args(AsyncMode)
    parser.add_argument("--modes", nargs="+", choices=modes, default=modes)
    parser.add_argument("--folder", metavar="DIR", help="on the disk that is measured")
    return run_benchmark(parser, argv, measured, takes_overrides=True)


def measured(options: argparse.Namespace) -> Iterator[Values]:
    """Yields the result of each mode."""
    for mode in options.modes:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            yield measure(mode, folder, options)


def measure(mode: str, folder: str, options: argparse.Namespace) -> Values:
    """Measures the run of one mode in separate processes."""
    steps = options.interval * (options.saves + 1)
    settings = [
        "--lr_scheduler.warmup_steps=1",
        *options.overrides,
        f"--job.dump_folder={folder}",
        f"--training.steps={steps}",
        "--metrics.log_freq=1",
        "--metrics.enable_tensorboard=false",
        "--checkpoint.enable=true",
        f"--checkpoint.interval={options.interval}",
        "--checkpoint.keep_latest_k=1",
        f"--checkpoint.async_mode={mode}",
    ]
    make_plan(options.config, settings, options.nproc)
    with Group(options.nproc) as group:
        records: list[Record] = group.call(train, options.config, settings)[0]
        plain = max(group.call(write_plainly, folder))
        resumed = group.call(resume, options.config, settings)[0]
    size = read_manifest(Path(folder) / "checkpoint" / f"step-{steps}").bytes
    summary = summarize(records, options.interval)
    return {
        "mode": mode,
        "config": options.config,
        "with": options.overrides,
        "processes": options.nproc,
        "bytes": size,
        **summary,
        "plain_gb_per_second": round(size / plain / 1e9, 3),
        "over_plain": round(summary["gb_per_second"] * 1e9 * plain / size, 3),
        **resumed,
    }


def train(config: str, settings: list[str]) -> list[Record]:
    """Trains a whole run; returns its records."""
    trainer = _build(config, settings)
    records: list[Record] = []
    log = trainer.monitor.meter.log
    trainer.monitor.meter.log = lambda *args, **kwargs: _kept(records, log(*args, **kwargs))  # type: ignore[method-assign]
    try:
        trainer.train()
    finally:
        trainer.close()
    return records


def summarize(records: Sequence[Record], interval: int) -> Values:
    """Returns medians over the saves; a save lasts from its step to the record with its costs."""
    # The steps up to the first save, without those that warm up.
    alone = statistics.median(r["seconds_per_step"] for r in records[2:interval])
    saves = [index for index, record in enumerate(records) if "checkpoint_bytes" in record]
    slower = []
    for number, index in enumerate(saves, start=1):
        # The first record is that of step 1.
        during = records[number * interval : index + 1]
        slower.append(sum(record["seconds_per_step"] - alone for record in during))
    costs = [records[index] for index in saves]
    blocked = [record["checkpoint_blocked_seconds"] for record in costs]
    lost = [sum(pair) for pair in zip(blocked, slower, strict=True)]
    return {
        "seconds_per_step": round(alone, 4),
        "blocked_seconds": round(statistics.median(blocked), 4),
        "blocked_over_step": round(statistics.median(blocked) / alone, 3),
        "lost_over_step": round(statistics.median(lost) / alone, 3),
        "save_seconds": round(statistics.median(r["checkpoint_seconds"] for r in costs), 3),
        "gb_per_second": round(statistics.median(r["checkpoint_gb_per_second"] for r in costs), 3),
    }


def write_plainly(folder: str) -> float:
    """Returns the seconds to write and sync this rank's share of the latest checkpoint."""
    (checkpoint,) = Path(folder, "checkpoint").glob("step-*")
    size = read_manifest(checkpoint).bytes // dist.get_world_size()
    block = os.urandom(min(BLOCK, size))
    path = Path(folder, f"plain-{dist.get_rank()}")
    dist.barrier()
    began = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for _ in range(size // len(block)):
            file.write(block)
        os.fsync(file.fileno())
    seconds = time.perf_counter() - began
    path.unlink()
    return seconds


def resume(config: str, settings: list[str]) -> Values:
    """Returns the seconds to read and check all files, and to load them, when a run resumes."""
    settings = [*settings, "--training.steps=1000000"]
    if dist.get_rank() == 0:
        _forget(Path(load_config(config, settings).config.job.dump_folder))
    dist.barrier()
    began = time.perf_counter()
    trainer = _build(config, settings)
    built = time.perf_counter() - began
    section, folder = trainer.plan.config.checkpoint, trainer.checkpoints.folder
    start = find_start(section, folder)
    began = time.perf_counter()
    agree_on_start(start, section, folder)
    checksums = time.perf_counter() - began
    began = time.perf_counter()
    trainer.checkpoints.load(start)
    load = time.perf_counter() - began
    trainer.close()
    return {
        "resume_seconds": round(built, 3),
        "of_which_checksums_from_memory": round(checksums, 3),
        "of_which_loading_from_memory": round(load, 3),
    }


def _build(config: str, settings: list[str]) -> Trainer:
    plan = make_plan(config, settings, Process.from_environment().world_size)
    return open_run(plan)


def _kept(records: list[Record], record: Record) -> Record:
    records.append(record)
    return record


def _forget(folder: Path) -> None:
    """Drops files from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    sys.exit(main())
