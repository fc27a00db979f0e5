"""Each sink by reading back what it wrote."""

import io
import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from titan_lite.config.schema import Metrics
from titan_lite.metrics.record import METRICS
from titan_lite.metrics.sinks import ConsoleSink, Destination, JsonlSink, WandbSink, open_sinks
from titan_lite.metrics.tensorboard_sink import TensorBoardSink


class Terminal(io.StringIO):
    def isatty(self):
        return True


def record(step, **changes):
    values = {
        "step": step,
        "loss": 6.12341,
        "grad_norm": 1.23451,
        "lr": 3e-3,
        "tokens": 5120 * step,
        "wps": 4512.4,
        "seconds_per_step": 0.5,
        "tflops": 0.1234,
        "mfu": 12.34,
        "data_wait": 0.3,
        "memory_gib": 0.61,
    }
    return values | changes


def destination(folder=Path(), settings=None, start_step=0, num_steps=100):
    return Destination(
        folder=folder, start_step=start_step, num_steps=num_steps, settings=settings or {}
    )


def test_a_small_slow_or_diverged_run_has_digits_on_the_console():
    tiny = {"wps": 0.25, "mfu": 0.0004, "memory_gib": 0.0031, "grad_norm": 3e-6, "data_wait": 3e-4}
    line = printed(record(5, **tiny, loss=1.5e12))
    assert "loss 1.5e+12  grad_norm    3e-06  " in line
    assert "wps      0.25  " in line
    assert "mfu 0.0004%  mem 0.0031 GiB  data  0.0%" in line


def printed(*records, num_steps=100, stream=None):
    stream = stream or io.StringIO()
    sink = ConsoleSink(destination(num_steps=num_steps), stream)
    for one in records:
        sink.write(one)
    return stream.getvalue()


def test_console_prints_one_readable_line_per_record():
    assert printed(record(10)) == (
        "step  10/100  loss  6.1234  grad_norm   1.2345  lr 3.00e-03  wps     4,512  "
        "tflops   0.123  mfu  12.3%  mem   0.61 GiB  data  0.3%  eta 0:00:45\n"
    )


def test_console_lines_are_aligned_from_the_first_step_to_the_last_and_from_cpu_to_gpu():
    small = printed(record(1)).splitlines()[0]
    large = printed(
        record(100, loss=10.5, grad_norm=321.1, wps=45_120.0, tflops=412.3, memory_gib=70.1)
    ).splitlines()[0]
    assert small.index("eta") == large.index("eta")
    assert small.index("lr") == large.index("lr")


def test_console_marks_warm_up_instead_of_an_estimate_from_it():
    line = printed(record(1, warmup=True))
    assert line.endswith("  start-up\n")
    assert "eta" not in line


def test_console_leaves_out_mfu_when_no_peak_is_known():
    values = record(10)
    del values["mfu"]
    assert "mfu" not in printed(values)


def test_console_shows_a_loss_that_is_not_finite():
    assert "loss     nan  grad_norm      inf" in printed(
        record(5, loss=math.nan, grad_norm=math.inf)
    )


def test_console_is_coloured_only_on_a_terminal_and_without_no_color(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\033[" not in printed(record(1))
    assert "\033[" in printed(record(1), stream=Terminal())
    monkeypatch.setenv("NO_COLOR", "")
    assert "\033[" in printed(record(1), stream=Terminal())
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\033[" not in printed(record(1), stream=Terminal())


def read_jsonl(path):
    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_jsonl_holds_every_record_before_it_is_closed(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    sink = JsonlSink(destination(path.parent))
    sink.write(record(1, warmup=True))
    sink.write(record(2))
    assert read_jsonl(path) == [record(1, warmup=True), record(2)]
    sink.close()


def test_jsonl_stays_strict_json_with_values_that_are_not_finite(tmp_path):
    sink = JsonlSink(destination(tmp_path))
    sink.write(record(1, loss=math.nan, grad_norm=math.inf, lr=-math.inf))
    sink.close()
    (read,) = read_jsonl(tmp_path / "metrics.jsonl")
    assert (read["loss"], read["grad_norm"], read["lr"]) == ("nan", "inf", "-inf")
    assert math.isnan(float(read["loss"]))


def test_resuming_drops_the_lines_after_the_resumed_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(destination(tmp_path))
    for step in (1, 10, 20, 30):
        sink.write(record(step))
    sink.close()
    sink = JsonlSink(destination(tmp_path, start_step=20))
    sink.write(record(21))
    sink.close()
    assert [line["step"] for line in read_jsonl(path)] == [1, 10, 20, 21]
    assert list(tmp_path.iterdir()) == [path]


def test_resuming_drops_a_line_cut_short_by_a_crash_and_says_so(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    # The second line ends inside a character.
    path.write_bytes(b'{"step": 1}\n{"step": 2, "lo\xc3')
    sink = JsonlSink(destination(tmp_path, start_step=2))
    sink.write(record(3))
    sink.close()
    assert [line["step"] for line in read_jsonl(path)] == [1, 3]
    assert "line 2 is not JSON and was dropped" in caplog.text


def test_a_run_that_starts_afresh_replaces_the_records_of_the_last(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 10}\n')
    JsonlSink(destination(tmp_path)).close()
    assert path.read_text() == ""


def read_tensorboard(folder):
    events = EventAccumulator(str(folder / "tb")).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_tensorboard_holds_each_key_under_its_tag(tmp_path):
    sink = TensorBoardSink(destination(tmp_path))
    sink.write(record(10, validation_loss=7.0))
    sink.close()
    scalars = read_tensorboard(tmp_path)
    keys = [key for key in record(10) if key != "step"]
    assert set(scalars) == {METRICS[key].tag for key in keys} | {"validation_loss"}
    for key in keys:
        ((step, value),) = scalars[METRICS[key].tag]
        assert step == 10
        assert value == pytest.approx(record(10)[key])


def test_tensorboard_leaves_out_the_speeds_of_the_warm_up(tmp_path):
    sink = TensorBoardSink(destination(tmp_path))
    sink.write(record(1, warmup=True))
    sink.close()
    assert set(read_tensorboard(tmp_path)) == {
        "train/loss",
        "train/grad_norm",
        "train/lr",
        "train/tokens",
        "memory/peak_gib",
    }


def test_tensorboard_hides_what_came_after_the_resumed_step(tmp_path):
    first = TensorBoardSink(destination(tmp_path))
    for step in (1, 10, 20, 30):
        first.write(record(step, loss=1.0))
    first.close()
    second = TensorBoardSink(destination(tmp_path, start_step=20))
    second.write(record(21, loss=2.0))
    second.close()
    assert read_tensorboard(tmp_path)["train/loss"] == [(1, 1), (10, 1), (20, 1), (21, 2)]


def test_tensorboard_takes_values_that_are_not_finite(tmp_path):
    sink = TensorBoardSink(destination(tmp_path))
    sink.write(record(1, loss=math.nan))
    sink.close()
    ((_, value),) = read_tensorboard(tmp_path)["train/loss"]
    assert math.isnan(value)


def test_tensorboard_can_be_switched_off(tmp_path):
    off = open_sinks(Metrics(enable_tensorboard=False), destination(tmp_path))
    assert [type(sink) for sink in off] == [ConsoleSink, JsonlSink]
    # One that is named as well is opened once.
    on = open_sinks(Metrics(sinks=["tensorboard", "jsonl"]), destination(tmp_path))
    assert [type(sink) for sink in on] == [ConsoleSink, JsonlSink, TensorBoardSink]
    for sink in off + on:
        sink.close()
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "tb"}


def test_tags_keep_their_names():
    """A tag that was published stays: dashboards are built on it."""
    published = {
        "loss": "train/loss",
        "grad_norm": "train/grad_norm",
        "lr": "train/lr",
        "loss_scale": "train/loss_scale",
        "skipped_steps": "train/skipped_steps",
        "tokens": "train/tokens",
        "wps": "speed/wps",
        "samples_per_second": "speed/samples_per_second",
        "seconds_per_step": "speed/seconds_per_step",
        "tflops": "speed/tflops",
        "mfu": "speed/mfu_percent",
        "mfu_causal": "speed/mfu_causal_percent",
        "hfu": "speed/hfu_percent",
        "data_wait": "speed/data_wait_percent",
        "memory_gib": "memory/peak_gib",
        "memory_reserved_gib": "memory/peak_reserved_gib",
        "alloc_retries": "memory/alloc_retries",
        "ooms": "memory/ooms",
    }
    assert {key: METRICS[key].tag for key in published} == published


def test_every_metric_is_documented():
    page = (Path(__file__).parent.parent.parent / "docs/metrics.md").read_text()
    rows = re.findall(r"^\| `([\w/]+)` \| `(\S+)` \| (.+?) \| (\w+) \|$", page, re.MULTILINE)
    assert rows == [(key, m.tag, m.unit, m.reduction) for key, m in METRICS.items()]


class FakeWandb:
    """Takes what wandb.init and its run are given."""

    def __init__(self):
        self.logged, self.given, self.finished = [], {}, False

    def init(self, **given):
        self.given = given
        return SimpleNamespace(
            log=lambda values, step: self.logged.append((step, values)),
            finish=self._finish,
            id=given["id"] or "drawn",
        )

    def _finish(self):
        self.finished = True


def test_wandb_gets_the_scalars_of_tensorboard_and_the_settings(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    section = Metrics(enable_wandb=True)
    settings = {"training": {"steps": 100}}
    sinks = open_sinks(section, destination(tmp_path, settings))
    for sink in sinks:
        sink.write(record(1, warmup=True))
        sink.write(record(2))
        sink.close()
    in_tensorboard = read_tensorboard(tmp_path)
    assert [step for step, _ in fake.logged] == [1, 2]
    assert fake.logged[1][1].keys() == in_tensorboard.keys()
    assert "speed/wps" not in fake.logged[0][1]
    assert fake.given["config"] == settings
    assert fake.given["dir"] == str(tmp_path)
    assert fake.finished
    # The next process of this run folder continues the same run.
    assert fake.given["id"] is None
    WandbSink(destination(tmp_path, settings))
    assert fake.given["id"] == "drawn"
    assert fake.given["resume"] == "allow"
