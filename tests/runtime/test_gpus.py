"""GPUs that training can use, as nvidia-smi and torch report them; both are stand-ins here."""

import warnings
from pathlib import Path

import pytest
import torch

from titan_lite.runtime import gpus
from titan_lite.runtime.gpus import count_gpus

TOO_OLD = (
    "CUDA initialization: The NVIDIA driver on your system is too old (found version 11040). "
    "(Triggered internally at /pytorch/c10/cuda/CUDAFunctions.cpp:109.)"
)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with two GPUs, which torch can use."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text(
        "#!/bin/sh\necho 'GPU 0: H100 (UUID: GPU-a)'\necho 'GPU 1: H100 (UUID: GPU-b)'\n"
    )
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("DEVICE", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    return monkeypatch


def test_gpus_are_those_that_torch_can_use(machine: pytest.MonkeyPatch) -> None:
    assert count_gpus() == 2
    # CUDA decides what this selects: only the first, because -1 ends the list.
    machine.setenv("CUDA_VISIBLE_DEVICES", "0,-1,1")
    machine.setattr(torch.cuda, "device_count", lambda: 1)
    assert count_gpus() == 1


@pytest.mark.parametrize("visible", ["", "-1", "-1,0", " ", "NoDevFiles"])
def test_gpus_that_are_hidden_on_purpose_are_not_asked_for(
    machine: pytest.MonkeyPatch, visible: str
) -> None:
    machine.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert count_gpus() == 0


def test_device_cpu_is_the_cpu_on_purpose(machine: pytest.MonkeyPatch) -> None:
    machine.setenv("DEVICE", "cpu")
    assert count_gpus() == 0
    machine.setenv("DEVICE", "gpu")
    with pytest.raises(ValueError, match=r"^DEVICE must be cpu or not set, got 'gpu'$"):
        count_gpus()


@pytest.mark.parametrize(
    ("cuda", "visible", "warning", "message"),
    [
        (
            None,
            None,
            "",
            r"torch \S+ is built without CUDA. To use them, install the CUDA build of",
        ),
        (
            "13.0",
            None,
            TOO_OLD,
            r"is too old \(found version 11040\). To use them, install a newer",
        ),
        ("13.0", "7", "", "CUDA_VISIBLE_DEVICES=7 selects none of them. To use them, correct or"),
        ("13.0", None, "", r"torch.cuda.is_available\(\) is False. To use them, install a newer"),
    ],
)
def test_gpus_that_torch_cannot_use_are_an_error_with_the_reason(
    machine: pytest.MonkeyPatch, cuda: str | None, visible: str | None, warning: str, message: str
) -> None:
    def is_available() -> bool:
        if warning:
            warnings.warn(warning, stacklevel=1)
        return False

    machine.setattr(torch.version, "cuda", cuda)
    machine.setattr(torch.cuda, "is_available", is_available)
    if visible is not None:
        machine.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(ValueError, match=message) as error:
        count_gpus()
    assert str(error.value).startswith("nvidia-smi lists GPUs (2), which torch cannot use: ")
    assert str(error.value).endswith("to train on the CPU, set DEVICE=cpu")
    assert "Triggered internally" not in str(error.value)


def test_without_nvidia_smi_the_driver_or_another_vendor_is_a_reason_to_ask_torch(
    machine: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    machine.setenv("PATH", "")
    machine.setattr(gpus, "DEVICE_FILES", (str(tmp_path / "kfd"),))
    assert count_gpus() == 0
    (tmp_path / "kfd").touch()
    assert count_gpus() == 2
    # Integrated graphics have the file, and cause no warning.
    machine.setattr(torch.cuda, "is_available", lambda: False)
    assert count_gpus() == 0


def test_an_nvidia_smi_without_gpus_is_a_machine_without(
    machine: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'No devices were found'\nexit 6\n")
    machine.setattr(gpus, "DEVICE_FILES", ())
    assert count_gpus() == 0
