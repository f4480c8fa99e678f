"""Measures how a GPU multiplies spikes fastest, and keeps the table for its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..core import registry
from ..core.errors import UnsupportedError
from ..core.version import VERSION, installed


def tune(tell: Callable[[str], object] = print) -> dict[str, Any]:
    """Measure the current CUDA or ROCm device and write its table, which layers read when they next choose.

    Args:
        tell: takes a line of text for each product that was timed.

    Returns:
        the device's name, the ``file`` and what stands in it.

    Raises:
        UnsupportedError: there is no GPU, or no Triton for it.
        FileError: the file cannot be written.
    """
    usable, reason = registry.load("backends", "triton").available()
    if not usable or not torch.cuda.is_available():
        raise UnsupportedError(
            f"nothing to tune: {'torch sees no CUDA or ROCm device' if usable else reason}. On a machine with a GPU "
            "this command measures it; without one no table is read."
        )
    from ..triton_kernels import crossovers
    from ..triton_kernels.tune import measure

    device = torch.device("cuda", torch.cuda.current_device())
    name = crossovers.name_of(device)
    path = crossovers.file_of(name)
    about = {
        "device": name,
        "torch": torch.__version__,
        "triton": str(installed("triton")),
        "package": VERSION,
    }
    crossovers.write(path, measure(device, tell=tell), **about)
    return {"file": str(path), **crossovers.plain(crossovers.read(path)), **about}
