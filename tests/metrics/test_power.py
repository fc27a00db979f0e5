"""Energy of GPUs, by a stand-in for NVML, and what the meter makes of it."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.metrics.test_meter import Run
from tests.runs import build_trainer
from titan_lite.config.load import ConfigError
from titan_lite.metrics.power import EnergyCounter
from titan_lite.metrics.record import METRICS

GPU = torch.device("cuda", 1)


class NVMLError(Exception):
    pass


class NVML:
    """One GPU, which has used 5,000 mJ."""

    NVMLError = NVMLError

    def __init__(self, *, has_counter: bool = True) -> None:
        self.has_counter, self.is_open = has_counter, False

    def nvmlInit(self) -> None:
        self.is_open = True

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        assert self.is_open
        if uuid != "GPU-0123":
            raise NVMLError("Not Found")
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        if not self.has_counter:
            raise NVMLError("Not Supported")
        return 5000


@pytest.fixture
def uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch knows the GPU by its UUID."""
    properties = SimpleNamespace(uuid="0123")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


@pytest.mark.usefixtures("uuid")
def test_a_counter_reads_joules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", NVML())
    assert EnergyCounter(GPU)() == 5.0


@pytest.mark.usefixtures("uuid")
@pytest.mark.parametrize(
    ("module", "message"),
    [
        (None, "requires nvidia-ml-py, which is not installed: pip install nvidia-ml-py"),
        (NVML(has_counter=False), "energy counter NVML can read, got Not Supported for GPU-0"),
    ],
)
def test_what_cannot_be_read_is_refused(
    module: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", module)
    with pytest.raises(ValueError, match=message):
        EnergyCounter(GPU)


def test_a_run_on_a_cpu_is_refused(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match=r"metrics.power.*requires an NVIDIA GPU, got cpu; set"):
        build_trainer(tmp_path, "--metrics.power=true")


def test_watts_and_joules_per_token_are_those_of_the_steps() -> None:
    """Two equal devices of 300 W, whose checkpoints take 100 W."""

    class Battery:
        joules = 7.0

        def __call__(self) -> float:
            return self.joules

    battery = Battery()
    run = Run(
        log_freq=2,
        num_devices=2,
        energy=battery,
        all_reduce=lambda tensor, operation: tensor * 2 if operation == "sum" else tensor,
    )

    def step() -> Any:
        battery.joules += 0.5 * 300
        return run.train(1, seconds=0.5)

    step()
    record = step()[-1]
    assert record["watts"] == pytest.approx(300)
    # Two devices at 300 W for 0.5 s a step of 1,000 tokens.
    assert record["joules_per_token"] == pytest.approx(0.3)
    with run.meter.excluded():
        run.clock.seconds += 10
        battery.joules += 1000
    step()
    record = step()[-1]
    assert record["watts"] == pytest.approx(300)
    assert {"watts", "joules_per_token"} <= METRICS.keys()


def test_without_a_counter_no_power_is_logged() -> None:
    assert "watts" not in Run().train(1)[-1]
