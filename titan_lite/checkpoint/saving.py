"""Saves one checkpoint at a time, optionally in the background, and measures the costs."""

import contextlib
import errno
import logging
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse
from torch.distributed.tensor import DTensor

from titan_lite.checkpoint.storage import CheckpointWriter, Files, first_failure
from titan_lite.config.schema import AsyncMode
from titan_lite.config.units import format_scaled
from titan_lite.runtime.distributed import BACKGROUND
from titan_lite.runtime.writing import WriteError

logger = logging.getLogger(__name__)

# Errors of a system without space: on the disk, in a quota, for one file.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

# In older versions, torch's stager works for one save only (pytorch/pytorch#183424).
REUSABLE_STAGER = torch.torch_version.TorchVersion(torch.__version__) >= (2, 13)  # type: ignore[operator]


class SaveError(WriteError):
    """A checkpoint could not be saved; raised on every rank."""


@dataclass
class Save:
    """A save, and its costs on this rank.

    folder: final name. size: bytes of the tensors of all ranks. files: written files, on rank 0.
    blocked: seconds that training waited. seconds: from start to commit.
    """

    step: int
    content: str
    folder: Path
    size: int = 0
    files: Files = field(default_factory=dict)
    blocked: float = 0.0
    started: float = 0.0
    seconds: float = 0.0
    staged: "Future[None]" = field(default_factory=Future)
    written: "Future[Any]" = field(default_factory=Future)

    @property
    def aside(self) -> Path:
        """Name of the folder until it is complete."""
        return self.folder.with_name(self.folder.name + ".incomplete")

    @contextlib.contextmanager
    def blocking(self) -> Iterator[None]:
        """Counts the time in its context as time that training waits."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.blocked += time.perf_counter() - began

    def end(self, upload: "Future[Any]") -> None:
        """Stops the clock, then releases the waiting threads."""
        self.seconds = time.perf_counter() - self.started
        if error := upload.exception():
            self.written.set_exception(error)
        else:
            self.written.set_result(None)

    def error(self) -> SaveError | None:
        """Waits for the end; returns an error with the reason if the save failed."""
        error = self.written.exception()
        if error is None:
            return None
        rank, cause = dist.get_rank(), error
        if isinstance(error, CheckpointException):
            rank, cause = first_failure(error)
        message = f"step {self.step} was not saved to {self.folder.parent}: rank {rank}: {cause}"
        if isinstance(cause, OSError) and cause.errno in NO_ROOM:
            free = shutil.disk_usage(self.folder.parent).free
            message += (
                f": a checkpoint of this run takes {format_scaled(self.size, 'B')}, and "
                f"{format_scaled(free, 'B')} are free there"
            )
        return SaveError(message)


class Saver:
    """Saves by torch.distributed.checkpoint with checkpoint.async_mode `mode`; collective."""

    def __init__(self, mode: AsyncMode, device: torch.device, timeout_seconds: int) -> None:
        self.mode = mode
        self.device = device
        self.group = None
        self.stager: DefaultStager | None = None
        if mode != "disabled":
            # A separate group, because a thread's collectives must not mix with those of training.
            self.group = dist.new_group(
                backend="gloo",
                timeout=timedelta(seconds=timeout_seconds),
                group_desc=BACKGROUND,
            )
        if mode == "async_pinned" and device.type != "cuda" and dist.get_rank() == 0:
            logger.warning(
                'checkpoint.async_mode = "async_pinned" requires a GPU; this run copies to '
                "pageable memory in a thread"
            )

    def start(self, save: Save, tensors: dict[str, Any], writer: CheckpointWriter) -> None:
        """Writes `tensors`, or starts to; `save.staged` and `save.written` report the progress."""
        save.started = time.perf_counter()
        if self.mode == "disabled":
            upload: Future[Any] = Future()
            try:
                upload.set_result(dcp.save(tensors, storage_writer=writer))
            except CheckpointException as error:
                upload.set_exception(error)
            save.staged.set_result(None)
            save.end(upload)
            return
        response = dcp.async_save(
            tensors,
            storage_writer=writer,
            process_group=self.group,
            # Without a stager, the writer copies to the host before this returns.
            async_stager=self._stager() if self.mode == "async_pinned" else None,
        )
        if isinstance(response, AsyncSaveResponse):
            save.staged = response.staging_completion
            response.upload_completion.add_done_callback(save.end)
        else:
            save.staged.set_result(None)
            response.add_done_callback(save.end)

    def close(self) -> None:
        """Releases the staging memory and the group, after the last save has ended."""
        if self.stager is not None:
            self.stager.close()
        if self.group is not None:
            dist.destroy_process_group(self.group)

    def _stager(self) -> DefaultStager:
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            # The copies run on a stream that does not wait for the training stream.
            torch.cuda.synchronize(self.device)
        if self.stager is not None and not REUSABLE_STAGER:
            self.stager.close()
            self.stager = None
        if self.stager is None:
            self.stager = DefaultStager(
                StagingOptions(
                    use_pinned_memory=on_gpu,
                    use_shared_memory=False,  # no other process reads it
                    use_async_staging=True,
                    use_non_blocking_copy=on_gpu,
                )
            )
        return self.stager


def local_bytes(tensors: Any) -> int:
    """This rank's bytes of a state dict; a replicated tensor counts on one rank only."""
    if isinstance(tensors, dict):
        return sum(map(local_bytes, tensors.values()))
    if isinstance(tensors, DTensor):
        copies = 1
        for size, placement in zip(tensors.device_mesh.shape, tensors.placements, strict=True):
            copies *= size if placement.is_replicate() else 1
        return tensors.to_local().nbytes // copies
    return tensors.nbytes if isinstance(tensors, torch.Tensor) else 0
