"""The energy of a GPU, from NVIDIA's management library (NVML)."""

import torch


class EnergyCounter:
    """Energy in joules that a device has used since its driver was loaded."""

    def __init__(self, device: torch.device) -> None:
        """Raises ValueError if the counter cannot be read."""
        if device.type != "cuda":
            raise ValueError(f"requires an NVIDIA GPU, got {device}; set metrics.power = false")
        try:
            import pynvml  # installed by the extra "power"
        except ImportError as error:
            message = "requires nvidia-ml-py, which is not installed: pip install nvidia-ml-py"
            raise ValueError(message) from error
        self._nvml = pynvml
        # By UUID, because NVML's index differs from torch's if CUDA_VISIBLE_DEVICES is set.
        uuid = torch.cuda.get_device_properties(device).uuid
        try:
            pynvml.nvmlInit()
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
            self()
        except pynvml.NVMLError as error:
            raise ValueError(
                f"requires a GPU whose energy counter NVML can read, got {error!s} for "
                f"GPU-{uuid}; set metrics.power = false"
            ) from error

    def __call__(self) -> float:
        return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1000)
