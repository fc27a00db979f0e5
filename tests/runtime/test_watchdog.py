"""Who was where when a rank hangs, and where NCCL writes what it knows."""

import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.distributed import Workers
from titan_lite.runtime.distributed import record_flights, store_of_its_own
from titan_lite.runtime.progress import Progress
from titan_lite.runtime.watchdog import Watchdog


def _report(phase_by_rank: list[Any]) -> str:
    """What rank 0 tells when the ranks are in these phases of these steps."""
    rank = dist.get_rank()
    progress = Progress()
    progress.enter(phase_by_rank[rank][1], step=phase_by_rank[rank][0])
    watchdog = Watchdog(
        progress,
        dist.PrefixStore("test", store_of_its_own()),
        rank=rank,
        world_size=dist.get_world_size(),
        timeout=1,
        tells=True,
    )
    try:
        time.sleep(0.3)
        dist.barrier()
        return watchdog.report()
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
        _, first, second = report.splitlines()
        step, phase = phases[behind]
        assert re.match(
            rf"  rank {behind}: {phase} of step {step} for \d s, (at _report|in b)", first
        )
        assert second.startswith(f"  rank {1 - behind}: ")


def test_the_flight_recorder_writes_below_the_run_folder_unless_told_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_NCCL_TRACE_BUFFER_SIZE", "7")
    for name in ("TORCH_NCCL_DUMP_ON_TIMEOUT", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"):
        monkeypatch.delenv(name, raising=False)
    record_flights(tmp_path)
    assert (tmp_path / "flight_recorder").is_dir()
    assert os.environ["TORCH_NCCL_TRACE_BUFFER_SIZE"] == "7"
    assert os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    path = str(tmp_path / "flight_recorder" / "rank")
    assert os.environ["TORCH_NCCL_DEBUG_INFO_TEMP_FILE"] == path
