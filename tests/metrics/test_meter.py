"""Each metric against a clock that the test moves."""

import json
import math

import pytest
import torch

from tests.metrics.test_sinks import destination
from titan_lite.config.schema import Metrics
from titan_lite.metrics.device import PeakFlops
from titan_lite.metrics.meter import Meter
from titan_lite.metrics.record import METRICS
from titan_lite.metrics.sinks import JsonlSink
from titan_lite.planner.counts import FlopsPerToken

CPU = torch.device("cpu")
FLOPS = FlopsPerToken(model=10**9, causal=9 * 10**8)


class Clock:
    seconds = 100.0

    def __call__(self):
        return self.seconds


class Sink:
    def __init__(self):
        self.records, self.closed = [], False

    def write(self, record):
        self.records.append(record)

    def close(self):
        self.closed = True


class Run:
    """A run of 1,000 tokens and 4 samples a step, with a meter on a separate clock."""

    def __init__(self, *, log_freq=10, start_step=0, **changes):
        self.clock, self.sink, self.step = Clock(), Sink(), start_step
        settings = {
            "section": Metrics(log_freq=log_freq),
            "sinks": [self.sink],
            "flops": FLOPS,
            "peak": PeakFlops(0.01, "the test"),
            "device": CPU,
            "num_devices": 1,
            "num_steps": 1000,
            "start_step": start_step,
            "clock": self.clock,
        }
        self.meter = Meter(**(settings | changes))

    def train(self, steps, *, seconds=0.5, waiting=0.0, excluded=0.0, loss=2.0):
        """Runs steps of this many seconds, of which `waiting`; `excluded` come on top."""
        for _ in range(steps):
            self.step += 1
            with self.meter.waiting_for_data():
                self.clock.seconds += waiting
            self.clock.seconds += seconds - waiting
            self.meter.add(tokens=1000, samples=4)
            if self.meter.should_log(self.step):
                self.meter.log(
                    self.step, loss=loss, grad_norm=1.0, lr=1e-3, tokens_seen=1000 * self.step
                )
            with self.meter.excluded():
                self.clock.seconds += excluded
        return self.sink.records


def test_the_first_step_every_log_freq_th_and_the_last_are_logged():
    meter = Run(log_freq=10, num_steps=35).meter
    assert [s for s in range(1, 36) if meter.should_log(s)] == [1, 10, 20, 30, 35]


def test_a_resumed_run_logs_its_own_first_step():
    meter = Run(log_freq=10, start_step=14, num_steps=35).meter
    assert [s for s in range(15, 36) if meter.should_log(s)] == [15, 20, 30, 35]


def test_windows_count_exactly_the_steps_between_log_lines():
    records = Run(log_freq=10, num_steps=13).train(13, seconds=0.5)
    assert [r["step"] for r in records] == [1, 10, 13]
    assert [r["seconds_per_step"] for r in records] == pytest.approx([0.5] * 3)
    assert [r["wps"] for r in records] == pytest.approx([2000] * 3)
    assert [r["samples_per_second"] for r in records] == pytest.approx([8] * 3)


@pytest.mark.parametrize("start_step", [0, 14])
def test_only_the_window_that_holds_start_up_is_marked_warm_up(start_step):
    run = Run(start_step=start_step)
    run.train(1, seconds=60)
    records = run.train(19)
    assert records[0]["step"] == start_step + 1
    assert records[0]["warmup"] is True
    assert not any("warmup" in r for r in records[1:])


def test_wps_is_per_device_so_two_devices_halve_it():
    one, two = (Run(num_devices=n).train(10)[-1] for n in (1, 2))
    assert one["wps"] == pytest.approx(2000)
    assert two["wps"] == pytest.approx(1000)
    assert two["tflops"] == pytest.approx(one["tflops"] / 2)
    assert two["mfu"] == pytest.approx(one["mfu"] / 2)
    assert two["samples_per_second"] == one["samples_per_second"]


def test_tflops_and_mfu_follow_from_wps_flops_and_peak():
    record = Run().train(10)[-1]
    assert record["tflops"] == pytest.approx(2000 * 1e9 / 1e12)
    assert record["mfu"] == pytest.approx(100 * 2.0 / 0.01)
    assert record["mfu_causal"] == pytest.approx(0.9 * record["mfu"])


def test_hfu_is_there_only_when_something_is_recomputed():
    assert "hfu" not in Run().train(1)[-1]
    record = Run(flops=FlopsPerToken(10**9, 9 * 10**8, hardware=13 * 10**8)).train(1)[-1]
    assert record["hfu"] == pytest.approx(1.3 * record["mfu"])


def test_an_unknown_peak_gives_no_mfu_and_names_the_key(caplog):
    caplog.set_level("INFO")
    source = "no peak is known for device 'X'; set metrics.peak_tflops"
    run = Run(peak=PeakFlops(None, source))
    record = run.train(10)[-1]
    assert not {"mfu", "mfu_causal", "hfu"} & set(record)
    assert record["tflops"] > 0
    assert f"MFU is not measured: {source}" in caplog.text
    assert f"not measured: {source}" in run.meter.summary().splitlines()[2]


def test_the_peak_and_its_source_are_logged_at_start(caplog):
    caplog.set_level("INFO")
    Run(peak=PeakFlops(989.4, "H100 SXM"))
    assert "MFU is relative to 989.4 TFLOP/s per device: H100 SXM" in caplog.text


def test_waiting_for_data_is_a_share_of_the_window_and_slows_the_step():
    record = Run().train(10, seconds=0.5, waiting=0.1)[-1]
    assert record["data_wait"] == pytest.approx(20)
    assert record["seconds_per_step"] == pytest.approx(0.5)


def test_excluded_time_slows_nothing():
    record = Run().train(10, seconds=0.5, excluded=7.0)[-1]
    assert record["wps"] == pytest.approx(2000)
    assert record["seconds_per_step"] == pytest.approx(0.5)


def test_time_is_counted_when_the_code_inside_raises():
    run = Run()

    def fail_after_a_second():
        run.clock.seconds += 1
        raise RuntimeError("disk full")

    for context in (run.meter.excluded, run.meter.waiting_for_data):
        with pytest.raises(RuntimeError, match="disk full"), context():
            fail_after_a_second()
    assert run.train(1, seconds=1.0)[-1]["data_wait"] == pytest.approx(50)


def test_every_key_has_its_unit_reduction_and_tag():
    record = Run(flops=FlopsPerToken(1, 1, hardware=2)).train(1)[-1]
    assert set(record) - {"step", "warmup"} <= set(METRICS)
    tags = [metric.tag for metric in METRICS.values()]
    assert len(set(tags)) == len(tags)
    assert {k for k, m in METRICS.items() if m.reduction == "max"} == {
        "data_wait",
        "memory_gib",
        "memory_reserved_gib",
        "alloc_retries",
        "ooms",
        "checkpoint_blocked_seconds",
        "checkpoint_seconds",
        "moe/max_bias",
    }


def test_the_worst_ranks_wait_and_memory_are_reduced_in_one_collective():
    calls = []

    def all_reduce(tensor, operation):
        calls.append((tensor.numel(), operation))
        return tensor + 1

    run = Run(all_reduce=all_reduce)
    records = run.train(10, waiting=0.1)
    assert calls == [(2, "max")] * len(records)
    assert records[-1]["data_wait"] == pytest.approx(21)


def test_an_accelerators_memory_is_recorded_and_its_peaks_start_anew_each_window(monkeypatch):
    stats = {
        "active_bytes.all.peak": 3 * 2**30,
        "reserved_bytes.all.peak": 4 * 2**30,
        "num_alloc_retries": 2,
        "num_ooms": 1,
    }
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: dict(stats))
    monkeypatch.setattr(
        torch.cuda,
        "reset_peak_memory_stats",
        lambda device: stats.update({"active_bytes.all.peak": 2**30}),
    )
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    run = Run(device=torch.device("cuda", 0))
    first, second = run.train(10)
    assert (first["memory_gib"], second["memory_gib"]) == (3, 1)
    assert [second[k] for k in ("memory_reserved_gib", "alloc_retries", "ooms")] == [4, 2, 1]
    assert "3.00 GiB active on one device" in run.meter.summary()


def test_tensors_are_read_on_log_steps_only_and_before_the_clock():
    run, reads = Run(), []

    class Loss:
        def __float__(self):
            reads.append(run.clock.seconds)
            run.clock.seconds += 1.5
            return 2.0

    run.train(9)
    run.step += 1
    run.clock.seconds += 0.5
    run.meter.add(1000, 4)
    run.meter.log(10, loss=Loss(), grad_norm=torch.tensor(1.0), lr=1e-3, tokens_seen=10_000)
    assert len(reads) == 1
    # 9 steps of 0.5 s since step 1, and 1.5 s until the device was done.
    assert run.sink.records[-1]["seconds_per_step"] == pytest.approx((9 * 0.5 + 1.5) / 9)


def test_values_that_are_not_finite_reach_the_file_as_json(tmp_path):
    run = Run(sinks=[JsonlSink(destination(tmp_path))])
    run.train(1, loss=torch.tensor(math.nan))
    run.meter.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] == "nan"
    assert "nan (step 1)" in run.meter.summary()


def test_extra_values_are_recorded_and_may_not_hide_a_metric():
    run = Run()
    log = {"loss": 1.0, "grad_norm": 1.0, "lr": 1.0, "tokens_seen": 1}
    run.clock.seconds += 1
    assert run.meter.log(1, **log, extra={"validation_loss": 3.0})["validation_loss"] == 3.0
    run.clock.seconds += 1
    with pytest.raises(AssertionError, match="wps"):
        run.meter.log(2, **log, extra={"wps": 3.0})


def test_closing_the_meter_closes_its_sinks():
    run = Run()
    run.meter.close()
    assert run.sink.closed


def test_the_summary_leaves_the_warm_up_out_of_its_averages():
    run = Run(num_devices=2)
    run.train(1, seconds=61, loss=7.5)
    run.train(9, seconds=0.5, excluded=2.0)
    run.train(10, seconds=1.0, loss=3.25)
    lines = run.meter.summary().splitlines()
    assert lines[0] == "loss         7.5000 (step 1) -> 3.2500 (step 20)"
    # 19 steps of 1,000 tokens in 4.5 + 10 s on 2 devices.
    assert lines[1] == "WPS          655 tokens/s per device, devices: 2"
    assert lines[2] == "MFU          6551.7% of 0.01 TFLOP/s (the test)"
    assert lines[3].startswith("peak memory  ")
    assert lines[3].endswith(" GiB resident in one process")
    assert lines[4] == "wall time    0:01:34, of which checkpoints and validation 0:00:18"
    assert len(lines) == 5


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_the_summary_of_a_run_without_a_second_window_says_not_measured(steps):
    run = Run()
    run.train(steps)
    lines = run.meter.summary().splitlines()
    assert len(lines) == 5
    assert "not measured: no step was logged after start-up" in lines[1]
    assert "not measured: no step was logged after start-up" in lines[2]
    assert ("not measured: no step was logged" in lines[0]) == (steps == 0)
    assert ("not measured: no step was logged" in lines[3]) == (steps == 0)
