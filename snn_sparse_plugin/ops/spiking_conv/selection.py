"""Which backend works on events of spiking maps."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...backends import select
from ...core.backend import RunsConvolutions
from ...core.config import current_config
from ...core.errors import UnsupportedError
from ...core.host import waits
from ...core.spikes import SpikeTrain


def takes_events(x: Tensor | SpikeTrain) -> RunsConvolutions | None:
    """The backend that adds rows for the events of an input like this; None where torch's own product runs."""
    if (isinstance(x, Tensor) and waits(x)) or 0 in x.shape:
        return None
    try:
        found: Any = select(current_config().backend, "convolution", device=x.device, dtype=x.dtype)
    except UnsupportedError:
        return None
    return found  # type: ignore[no-any-return]
