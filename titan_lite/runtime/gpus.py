"""Counts the GPUs that training can use on this machine."""

import os
import shutil
import subprocess
import warnings
from pathlib import Path

# One of these exists if there may be a GPU: NVIDIA's driver, the same under WSL, AMD's driver.
DEVICE_FILES = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
# First entries of CUDA_VISIBLE_DEVICES by which users and Slurm hide all GPUs.
HIDDEN = ("", "-1", "NoDevFiles")


def count_gpus() -> int:
    """Number of GPUs that torch can use; 0 to train on the CPU.

    Raises ValueError if the machine has GPUs that torch cannot use, unless the environment hides
    them on purpose.
    """
    device, visible = os.environ.get("DEVICE", ""), os.environ.get("CUDA_VISIBLE_DEVICES")
    if device not in ("", "cpu"):
        raise ValueError(f"DEVICE must be cpu or not set, got {device!r}")
    if device == "cpu" or (visible is not None and visible.split(",")[0].strip() in HIDDEN):
        return 0
    listed = _listed_by_nvidia_smi()
    if not listed and not any(Path(name).exists() for name in DEVICE_FILES):
        return 0
    # Imported late: it takes a second, and machines without a GPU do not need it.
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        usable = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if usable or not listed:
        return usable
    advice = "install a newer NVIDIA driver, or a torch built for an older CUDA"
    if torch.version.cuda is None:
        reason = f"torch {torch.__version__} is built without CUDA"
        advice = f"install the CUDA build of torch {torch.__version__.split('+')[0]}"
    elif caught:
        # Without the position in torch's source at the end of the message.
        reason = str(caught[0].message).split(" (Triggered internally")[0].strip().rstrip(".")
    elif visible is not None:
        reason = f"CUDA_VISIBLE_DEVICES={visible} selects none of them"
        advice = "correct or unset it"
    else:
        reason = "torch.cuda.is_available() is False"
    raise ValueError(
        f"nvidia-smi lists GPUs ({listed}), which torch cannot use: {reason}. "
        f"To use them, {advice}; to train on the CPU, set DEVICE=cpu"
    )


def _listed_by_nvidia_smi() -> int:
    if not (program := shutil.which("nvidia-smi")):
        return 0
    try:
        result = subprocess.run(
            [program, "-L"], capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in result.stdout.splitlines())
