"""Where records go: a line on the console, a JSON line, TensorBoard events, W&B."""

import contextlib
import json
import logging
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

from titan_lite.config.schema import Metrics
from titan_lite.config.units import format_duration, format_number
from titan_lite.metrics.progress_line import ProgressLine
from titan_lite.metrics.record import Record, scalars
from titan_lite.runtime.writing import writing

logger = logging.getLogger(__name__)


class Sink(Protocol):
    """Takes one record per log step."""

    def write(self, record: Record) -> None:
        """Writes one record."""

    def close(self) -> None:
        """Writes what is pending and lets go of files."""


def open_sinks(
    section: Metrics,
    folder: Path,
    *,
    num_steps: int,
    start_step: int,
    settings: Mapping[str, Any] | None = None,
) -> list[Sink]:
    """The sinks of a run below its folder, for the one rank that writes.

    settings: the run's, by section, for a sink that stores them.
    """
    sinks: list[Sink] = [
        ConsoleSink(num_steps),
        JsonlSink(folder / "metrics.jsonl", start_step=start_step),
    ]
    if section.enable_tensorboard:
        # Takes a tenth of a second, which the ranks that write nothing need not wait for.
        from titan_lite.metrics.tensorboard_sink import TensorBoardSink

        sinks.append(TensorBoardSink(folder / "tb", start_step=start_step))
    if section.enable_wandb:
        sinks.append(WandbSink(folder, settings or {}))
    return sinks


class ConsoleSink:
    """Prints one aligned line per record; on a terminal, a line of progress below the last one.

    Labels are faint on a terminal unless NO_COLOR is set.
    """

    def __init__(self, num_steps: int, stream: TextIO | None = None) -> None:
        self._num_steps = num_steps
        self._stream = stream or sys.stdout
        # https://no-color.org: any non-empty value.
        self._color = self._stream.isatty() and not os.environ.get("NO_COLOR")
        self._progress = ProgressLine(num_steps, self._stream) if self._stream.isatty() else None

    def write(self, record: Record) -> None:
        """Prints the record; keys it does not hold are left out."""
        step, width = int(record["step"]), len(str(self._num_steps))
        fields = [("step", f"{step:{width}}/{self._num_steps}")]
        fields += [
            (label, f"{format_number(record[key], form)}{unit}")
            for key, label, form, unit in (
                ("loss", "loss", "7.4f", ""),
                ("validation/loss", "validation", "7.4f", ""),
                ("grad_norm", "grad_norm", "8.4f", ""),
                ("skipped_steps", "skipped", ".0f", ""),
                ("lr", "lr", ".2e", ""),
                ("wps", "wps", "9,.0f", ""),
                ("tflops", "tflops", "7.3f", ""),
                ("mfu", "mfu", "5.1f", "%"),
                ("memory_gib", "mem", "6.2f", " GiB"),
            )
            if key in record
        ]
        # Of little waiting the exact share is of no use.
        if "data_wait" in record:
            fields.append(("data", f"{record['data_wait']:4.1f}%"))
        if record.get("warmup"):
            fields.append(("warm-up", ""))
        else:
            eta = (self._num_steps - step) * record["seconds_per_step"]
            fields.append(("eta", format_duration(eta)))
        line = "  ".join(f"{self._faint(label)} {value}" for label, value in fields)
        if self._progress:
            self._progress.erase()
        # Of a terminal that was closed, the run ends by its signal, with a checkpoint.
        with contextlib.suppress(OSError):
            print(line.rstrip(), file=self._stream, flush=True)
        if self._progress:
            self._progress.draw(record)

    def close(self) -> None:
        """Leaves the stream open: it is not this sink's."""
        if self._progress:
            self._progress.close()

    def _faint(self, label: str) -> str:
        return f"\033[2m{label}\033[22m" if self._color else label


class JsonlSink:
    """Appends one strict JSON object per record and line.

    Opening drops the records after `start_step`, which the run is about to write again (all of them
    for a run that starts afresh), and a line cut short by a crash. Non-finite numbers, which JSON
    does not have, are the strings "nan", "inf" and "-inf": Python's float() reads them back.
    """

    def __init__(self, path: Path, *, start_step: int = 0) -> None:
        self._path = path
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                _drop_records_after(path, start_step)
            self._file = path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        """Appends the record and hands it to the system, so that a crash loses nothing."""
        values = {
            key: value if math.isfinite(value) else str(value) for key, value in record.items()
        }
        with writing(self._path):
            self._file.write(json.dumps(values, allow_nan=False) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Closes the file; what could not be written has been told before."""
        with contextlib.suppress(OSError):
            self._file.close()


def _drop_records_after(path: Path, step: int) -> None:
    kept = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            logger.warning("%s: line %d is not JSON and was dropped: %.80r", path, number, line)
            continue
        if record["step"] <= step:
            kept.append(line + "\n")
    # Written aside and renamed: a crash here must not lose the records of a long run.
    aside = path.with_name(path.name + ".tmp")
    aside.write_text("".join(kept), encoding="utf-8")
    aside.replace(path)


class WandbSink:
    """Logs the same scalars to Weights & Biases, as its own environment variables say.

    WANDB_API_KEY, WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE. A run that resumes in its folder goes on
    in the same run there, which keeps the first value of a step that is logged twice.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        import wandb

        id_file = folder / "wandb" / "run_id"
        known = id_file.read_text(encoding="utf-8") if id_file.exists() else None
        self._run = wandb.init(
            dir=str(folder), name=folder.name, config=dict(settings), id=known, resume="allow"
        )
        with writing(id_file):
            id_file.parent.mkdir(exist_ok=True)
            id_file.write_text(self._run.id, encoding="utf-8")

    def write(self, record: Record) -> None:
        """Logs the record's scalars at its step."""
        self._run.log(scalars(record), step=int(record["step"]))

    def close(self) -> None:
        """Waits until everything is sent."""
        self._run.finish()
