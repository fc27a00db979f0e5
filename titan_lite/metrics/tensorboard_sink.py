"""The sink that writes TensorBoard's event files."""

import contextlib
import os
import socket
import time
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from titan_lite.metrics.record import Record, scalars
from titan_lite.metrics.sinks import Destination
from titan_lite.runtime.writing import writing


class TensorBoardSink:
    """Writes a scalar per key to tb/; after a resume, values after the start step are hidden.

    It uses TensorBoard's RecordWriter. EventFileWriter writes in a thread, which prints a traceback
    on a full disk, and loses pending events at the end of a run.
    """

    def __init__(self, destination: Destination) -> None:
        # The name that TensorBoard expects; a run that is started again writes another file.
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self._folder = folder = destination.folder / "tb"
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._writer = RecordWriter((folder / name).open("wb"))
        self._add(Event(file_version="brain.Event:2"))
        start = SessionLog(status=SessionLog.START)
        self._add(Event(step=destination.start_step + 1, session_log=start))

    def write(self, record: Record) -> None:
        """Adds the record's scalars, and flushes them to the system."""
        values = [
            Summary.Value(tag=tag, simple_value=value) for tag, value in scalars(record).items()
        ]
        self._add(Event(step=int(record["step"]), summary=Summary(value=values)))

    def close(self) -> None:
        """Closes the file; errors of writing have been reported before."""
        with contextlib.suppress(OSError):
            self._writer.close()

    def _add(self, event: Any) -> None:
        event.wall_time = time.time()
        with writing(self._folder):
            self._writer.write(event.SerializeToString())
            self._writer.flush()
