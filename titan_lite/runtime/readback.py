"""Copies of numbers from the device to the host that do not wait."""

from typing import Any

import torch
from torch import Tensor


class Readback:
    """A copy of a tensor to the host, which waits only in `read`."""

    def __init__(self, tensor: Tensor) -> None:
        self._event = None
        self.copy = tensor
        if tensor.device.type == "cuda":
            self.copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self.copy.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> list[Any]:
        """The numbers; waits until the device has computed them."""
        if self._event is not None:
            self._event.synchronize()
        return self.copy.tolist()
