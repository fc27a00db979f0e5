"""Sinks for records: console, JSON lines, TensorBoard, Weights & Biases."""

import contextlib
import json
import logging
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO

from titan_lite.config.registry import SINKS, load
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
        """Writes pending records and closes files."""


@dataclass(frozen=True, kw_only=True)
class Destination:
    """Facts with which a sink is opened, on the only rank that writes."""

    folder: Path
    """The run's folder."""
    start_step: int
    """Steps done before; a sink drops stored records of later steps."""
    num_steps: int
    """Last step of the run."""
    settings: Mapping[str, Any]
    """The configuration, by table and key."""


def open_sinks(section: Metrics, destination: Destination) -> list[Sink]:
    """Opens the sinks of a run, by the rows of SINKS."""
    names = ["console", "jsonl"]
    if section.enable_tensorboard:
        names.append("tensorboard")
    if section.enable_wandb:
        names.append("wandb")
    return [load(SINKS[name])(destination) for name in dict.fromkeys([*names, *section.sinks])]


class ConsoleSink:
    """Prints one aligned line per record; on a terminal, with a progress line below the last one.

    Labels are faint on a terminal unless NO_COLOR is set.
    """

    def __init__(self, destination: Destination, stream: TextIO | None = None) -> None:
        self._num_steps = destination.num_steps
        self._stream = stream or sys.stdout
        is_terminal = self._stream.isatty()
        # https://no-color.org: any non-empty value.
        self._color = is_terminal and not os.environ.get("NO_COLOR")
        self._progress = ProgressLine(self._num_steps, self._stream) if is_terminal else None

    def write(self, record: Record) -> None:
        """Prints the record; skips keys that it does not have."""
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
        # One digit is enough for the share of waiting.
        if "data_wait" in record:
            fields.append(("data", f"{record['data_wait']:4.1f}%"))
        if record.get("warmup"):
            fields.append(("start-up", ""))
        else:
            eta = (self._num_steps - step) * record["seconds_per_step"]
            fields.append(("eta", format_duration(eta)))
        line = "  ".join(f"{self._faint(label)} {value}" for label, value in fields).rstrip()
        # If the terminal is closed, a signal ends the run, with a checkpoint.
        with contextlib.suppress(OSError):
            if self._progress:
                self._progress.write(line, record)
            else:
                print(line, file=self._stream, flush=True)

    def close(self) -> None:
        """Closes the progress line, but not the stream, which the sink does not own."""
        if self._progress:
            self._progress.close()

    def _faint(self, label: str) -> str:
        return f"\033[2m{label}\033[22m" if self._color else label


class JsonlSink:
    """Appends one strict JSON object per record and line to metrics.jsonl.

    Opening drops records after the start step, which the run will write again (all of them for a
    run that starts from step 0), and an incomplete line after a crash. JSON has no non-finite
    numbers, so they are the strings "nan", "inf" and "-inf", which Python's float() reads.
    """

    def __init__(self, destination: Destination) -> None:
        self._path = path = destination.folder / "metrics.jsonl"
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                _drop_records_after(path, destination.start_step)
            self._file = path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        """Appends the record and flushes it to the system, so that a crash loses nothing."""
        values = {
            key: value if isinstance(value, list) or math.isfinite(value) else str(value)
            for key, value in record.items()
        }
        with writing(self._path):
            self._file.write(json.dumps(values, allow_nan=False) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Closes the file; errors of writing have been reported before."""
        with contextlib.suppress(OSError):
            self._file.close()


def _drop_records_after(path: Path, step: int) -> None:
    kept = []
    # A line that was cut short may end inside a character.
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            logger.warning("%s: line %d is not JSON and was dropped: %.80r", path, number, line)
            continue
        if record["step"] <= step:
            kept.append(line + "\n")
    # Written to another file and renamed, so that a crash does not lose the records of a long run.
    aside = path.with_name(path.name + ".tmp")
    aside.write_text("".join(kept), encoding="utf-8")
    aside.replace(path)


class WandbSink:
    """Logs the same scalars to Weights & Biases.

    Configured by WANDB_API_KEY, WANDB_PROJECT, WANDB_ENTITY and WANDB_MODE. A resumed run continues
    the same run of W&B, which keeps the first value of a step that is logged twice.
    """

    def __init__(self, destination: Destination) -> None:
        import wandb

        folder, settings = destination.folder, dict(destination.settings)
        id_file = folder / "wandb" / "run_id"
        known = id_file.read_text(encoding="utf-8") if id_file.exists() else None
        self._run = wandb.init(
            dir=str(folder), name=folder.name, config=settings, id=known, resume="allow"
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
