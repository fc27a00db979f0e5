"""The progress line: the bytes written to a terminal, and the resulting screen."""

import io
import logging
import math

import pytest

from tests.metrics.test_sinks import Terminal, record
from titan_lite.metrics.progress_line import ProgressLine
from titan_lite.metrics.sinks import ConsoleSink


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
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
    sink = ConsoleSink(100, stream)
    for step in (10, 20):
        sink.write(record(step, tokens=1_234_567 * step))
    first, second, progress = screen(stream)
    assert first.startswith("step  10/100")
    assert second.startswith("step  20/100")
    assert progress == (
        "[====                ] 20/100 steps  24.7M tokens  smoothed loss 6.1234  0:00:40 left"
    )


def test_elsewhere_there_are_plain_lines_only() -> None:
    stream = io.StringIO()
    sink = ConsoleSink(100, stream)
    sink.write(record(10))
    sink.close()
    assert "smoothed" not in stream.getvalue()
    assert "\r" not in stream.getvalue()


def test_the_loss_is_smoothed_and_a_step_that_is_not_finite_left_out() -> None:
    stream = Terminal()
    line = ProgressLine(100, stream)
    for step, loss in ((1, 8.0), (2, math.nan), (3, 6.0)):
        line.erase()
        line.draw(record(step, loss=loss))
    # Weights 0.9 x 0.1 and 0.1.
    assert f"smoothed loss {(0.09 * 8 + 0.1 * 6) / 0.19:.4f}" in screen(stream)[-1]


def test_the_warm_up_gives_no_estimate() -> None:
    stream = Terminal()
    ProgressLine(100, stream).draw(record(1, warmup=True))
    assert "left" not in stream.getvalue()


def test_the_line_is_gone_after_the_last_step_and_when_the_run_ends() -> None:
    for steps in ((99, 100), (50,)):
        stream = Terminal()
        sink = ConsoleSink(100, stream)
        for step in steps:
            sink.write(record(step))
        sink.close()
        assert screen(stream)[-1] == ""


def test_a_log_message_finds_the_line_empty() -> None:
    stream = Terminal()
    logger, handler = logging.getLogger("titan_lite"), logging.StreamHandler(stream)
    logger.addHandler(handler)
    try:
        sink = ConsoleSink(100, stream)
        sink.write(record(10))
        logger.warning("Checkpoint written")
        sink.write(record(20))
        sink.close()
    finally:
        logger.removeHandler(handler)
    assert [line[:18] for line in screen(stream)] == [
        "step  10/100  loss",
        "Checkpoint written",
        "step  20/100  loss",
        "",
    ]
    assert handler.filters == []


@pytest.mark.parametrize(
    ("columns", "shown"),
    [
        (80, "[=====     ] 5000/10000 steps  2.56M tokens  smoothed loss 6.1234  0:41:40 left"),
        (60, "5000/10000 steps  smoothed loss 6.1234  0:41:40 left"),
        (40, "[===   ] 5000/10000 steps  0:41:40 left"),
        (20, "5000/10000 steps  0"),
    ],
)
def test_a_narrow_terminal_shows_what_matters_most(
    columns: int, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    stream = Terminal()
    ProgressLine(10_000, stream).draw(record(5_000, tokens=2_560_000))
    assert stream.getvalue() == shown
    assert len(shown) < columns
