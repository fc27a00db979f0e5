"""Reports of each rank's position when one hangs, and the path of NCCL's dump."""

import itertools
import mmap
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.distributed import Workers
from titan_lite.runtime.distributed import FLIGHT_RECORDER, clone_store, enable_flight_recorder
from titan_lite.runtime.progress import Progress
from titan_lite.runtime.watchdog import Watchdog


def _report(phase_by_rank: list[Any]) -> str:
    """Rank 0's report when the ranks are in these phases, once it has heard where both wait."""
    rank = dist.get_rank()
    progress = Progress()
    progress.enter(phase_by_rank[rank][1], step=phase_by_rank[rank][0])
    watchdog = Watchdog(
        progress,
        dist.PrefixStore("test", clone_store()),
        rank=rank,
        world_size=dist.get_world_size(),
        timeout=1,
        logs=True,
        hint="Look elsewhere, too",
    )
    try:
        waiting = [
            rf"rank {rank}: {phase} of step {step} for \d+ s, (at _report|in b)"
            for rank, (step, phase) in enumerate(phase_by_rank)
        ]
        report = watchdog.report()
        while not all(re.search(line, report) for line in waiting):
            time.sleep(0.1)
            report = watchdog.report()
        dist.barrier()
        return report
    finally:
        watchdog.close()


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("phases", "behind"),
    [
        ([(7, "backward"), (7, "data")], 1),
        ([(7, "optimizer"), (8, "data")], 0),
        ([(7, "save"), (7, "log")], 1),
    ],
)
def test_the_report_begins_with_the_rank_that_is_furthest_behind(
    workers: dict[int, Workers], phases: list[Any], behind: int
) -> None:
    for report in workers[2].run(_report, phases):
        _, first, second, last = report.splitlines()
        step, phase = phases[behind]
        assert re.match(
            rf"  rank {behind}: {phase} of step {step} for \d+ s, (at _report|in b)", first
        )
        assert second.startswith(f"  rank {1 - behind}: ")
        assert last == "Look elsewhere, too"


def test_the_flight_recorder_writes_below_the_run_folder_unless_told_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in itertools.chain(*FLIGHT_RECORDER):
        monkeypatch.setenv(name, "")  # for it to be as it was after the test
        monkeypatch.delenv(name)
    # By the name it had before.
    monkeypatch.setenv("TORCH_NCCL_TRACE_BUFFER_SIZE", "7")
    hint = enable_flight_recorder(tmp_path)
    folder = tmp_path / "flight_recorder"
    assert folder.is_dir()
    assert f"to {folder}/rankRANK: torchfrtrace {folder} compares" in hint
    assert "TORCH_FR_BUFFER_SIZE" not in os.environ
    assert os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    assert os.environ["TORCH_FR_DUMP_TEMP_FILE"] == f"{folder}/rank"
    monkeypatch.delenv("TORCH_FR_DUMP_TEMP_FILE")
    monkeypatch.setenv("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", "/elsewhere/r")
    assert "to /elsewhere/rRANK: torchfrtrace /elsewhere compares" in enable_flight_recorder(
        tmp_path
    )


def test_the_flight_recorders_variables_are_those_that_torch_reads() -> None:
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as content:
        for name, *_ in FLIGHT_RECORDER:
            # This one is read by NCCL's part, which is in GPU builds.
            assert name == "TORCH_NCCL_DUMP_ON_TIMEOUT" or content.find(name.encode()) > 0, name
