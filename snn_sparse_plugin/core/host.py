"""What Python may know of numbers that stand on a device."""

from __future__ import annotations

from torch import Tensor


def waits(x: Tensor) -> bool:
    """Whether to read a number of this tensor is to wait for a device, and what a CUDA graph cannot capture."""
    return x.device.type != "cpu"
