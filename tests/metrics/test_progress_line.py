"""The progress line: the bytes written to a terminal, and the resulting screen."""

import contextlib
import fcntl
import io
import logging
import math
import os
import pty
import re
import struct
import termios

import pytest

from tests.metrics.test_sinks import Terminal, destination, record
from titan_lite.metrics.sinks import ConsoleSink


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")


def screen(stream: io.StringIO) -> list[str]:
    """The lines that a terminal would show."""
    lines = []
    for line in stream.getvalue().split("\n"):
        shown: list[str] = []
        for part in line.split("\r"):
            shown[: len(part)] = part
        lines.append("".join(shown).rstrip())
    return lines


def test_a_terminal_shows_progress_below_the_last_record() -> None:
    stream = Terminal()
    sink = ConsoleSink(destination(), stream)
    for step in (10, 20):
        sink.write(record(step, tokens=1_234_567 * step))
    first, second, progress = screen(stream)
    assert first.startswith("step  10/100")
    assert second.startswith("step  20/100")
    assert re.fullmatch(
        r"20/100 steps, \d\d:\d\d left, smoothed loss 6\.1234, 24\.7M tokens \[==== {16}\]",
        progress,
    )


def test_elsewhere_there_are_plain_lines_only() -> None:
    stream = io.StringIO()
    sink = ConsoleSink(destination(), stream)
    sink.write(record(10))
    sink.close()
    assert "smoothed" not in stream.getvalue()
    assert "\r" not in stream.getvalue()


def test_the_loss_is_smoothed_and_a_step_that_is_not_finite_left_out() -> None:
    stream = Terminal()
    sink = ConsoleSink(destination(), stream)
    for step, loss in ((1, 8.0), (2, math.nan), (3, 6.0)):
        sink.write(record(step, loss=loss))
    # Weights 0.9 x 0.1 and 0.1.
    assert f"smoothed loss {(0.09 * 8 + 0.1 * 6) / 0.19:.4f}" in screen(stream)[-1]


def test_the_time_left_does_not_count_what_was_before_the_first_record() -> None:
    """Compilation, or the steps before a resume."""
    stream = Terminal()
    sink = ConsoleSink(destination(), stream)
    sink.write(record(40))
    assert "40/100 steps, ? left" in screen(stream)[-1]


def test_the_line_is_gone_after_the_last_step_and_when_the_run_ends() -> None:
    for steps in ((99, 100), (50,)):
        stream = Terminal()
        sink = ConsoleSink(destination(), stream)
        for step in steps:
            sink.write(record(step))
        sink.close()
        assert screen(stream)[-1] == ""


def test_a_log_message_is_printed_above_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr("sys.stdout", stream)
    logger, handler = logging.getLogger("titan_lite"), logging.StreamHandler(stream)
    monkeypatch.setattr(logger, "handlers", [handler])
    sink = ConsoleSink(destination())
    sink.write(record(10))
    logger.warning("Checkpoint written")
    sink.write(record(20))
    sink.close()
    assert [line[:18] for line in screen(stream)] == [
        "step  10/100  loss",
        "Checkpoint written",
        "step  20/100  loss",
        "",
    ]
    assert logger.handlers == [handler]


@pytest.mark.parametrize("columns", [80, 40, 20])
def test_a_narrow_terminal_shows_what_fits(columns: int) -> None:
    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with os.fdopen(writer, "w") as stream:
        sink = ConsoleSink(destination(num_steps=10_000), stream)
        sink.write(record(5_000, tokens=2_560_000))
        sink.close()
    written = ""
    # On Linux, reading past the end of a terminal is an error.
    with contextlib.suppress(OSError):
        while part := os.read(reader, 10_000):
            written += part.decode()
    os.close(reader)
    *_, shown = [line for line in written.split("\r") if line.startswith("5000/10000 steps")]
    assert len(shown) <= columns
    assert ("smoothed loss 6.1234" in shown) == (columns == 80)
