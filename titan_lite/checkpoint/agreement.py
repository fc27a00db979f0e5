"""Checks that all ranks start from the same undamaged checkpoint, and read the same data."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from titan_lite.checkpoint.manifest import read_manifest
from titan_lite.checkpoint.state import Start, find_start
from titan_lite.config.problems import SettingError
from titan_lite.config.schema import Checkpoint
from titan_lite.config.units import format_scaled
from titan_lite.runtime.stored_files import DamagedError, damaged_files

logger = logging.getLogger(__name__)


def agree_on_start(
    start: Start, section: Checkpoint, folder: Path, *, last_step: int | None = None
) -> Start:
    """Returns the start of all ranks, after reading all its files; collective. See find_start.

    With load_step = "latest", skips damaged checkpoints. Raises DamagedError, and on every rank
    ValueError if ranks found different checkpoints.
    """
    starts: list[tuple[int, str]] = [(0, "")] * dist.get_world_size()
    dist.all_gather_object(starts, (start.state.step, str(start.source)))
    if len(set(starts)) > 1:
        raise SettingError(
            "job.dump_folder",
            f"ranks found checkpoints of different steps in {folder} (rank 0 first; 0 for none): "
            f"{[step for step, _ in starts]}. The folder must be on a file system that all nodes "
            "share",
        )
    damaged: dict[Path, DamagedError] = {}
    while start.source is not None and (sentences := _damage(start.source)):
        damaged[start.source] = DamagedError("; ".join(sentences))
        if not start.resumes or section.load_step != "latest":
            raise damaged[start.source]
        start = find_start(section, folder, damaged, last_step=last_step)
    return start


def agree_on_data(settings: Mapping[str, Any]) -> None:
    """Raises ValueError on every rank if their data settings differ; collective."""
    by_rank: list[Mapping[str, Any]] = [settings] * dist.get_world_size()
    dist.all_gather_object(by_rank, settings)
    for rank, of_rank in enumerate(by_rank):
        for key, value in of_rank.items():
            if value != by_rank[0][key]:
                raise SettingError(
                    ("data.dataset", "data.dataset_path", "data.sources"),
                    f"ranks read different data: {key} is {by_rank[0][key]!r} on rank 0 and "
                    f"{value!r} on rank {rank}; the files of data.dataset_path or data.sources "
                    "must be the same on all nodes",
                )


def _damage(source: Path) -> list[str]:
    """Returns the faults of a checkpoint's files, which the ranks divide among them; collective."""
    manifest = read_manifest(source)
    logger.info("Reading %s in %s for its checksums", format_scaled(manifest.bytes, "B"), source)
    rank, size = dist.get_rank(), dist.get_world_size()
    problems: list[list[str]] = [[]] * size
    dist.all_gather_object(
        problems, damaged_files(source, manifest.files, sorted(manifest.files)[rank::size])
    )
    return [sentence for sentences in problems for sentence in sentences]
