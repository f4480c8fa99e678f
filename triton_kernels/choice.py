"""Which way a dense input is multiplied with its weight: as events whose rows are added, or by the library's product.

How many of its numbers are not zero is known on the device alone. It is counted there now and then, copied without
waiting, and believed from the call on at which the copy has arrived. Until then the library's product runs.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from ..core.host import waits

log = logging.getLogger("snn_sparse_plugin")

# the densities below which rows are added, by how the library multiplies float32, for up to so many outputs.
# Measured on an H100 (128000 x 1000 -> 1000 and 32000 x 700 -> 200); benchmarks/gpu_check.py --parts density for others
ROWS_BELOW = {"ieee": ((256, 0.13), (1 << 31, 0.10)), "tf32": ((256, 0.04), (1 << 31, 0.015))}

_MOST = 4096  # layers and shapes that are remembered


class _Seen:
    """The density of one layer's input, as it was last read."""

    def __init__(self) -> None:
        self.calls, self.next = 0, 1
        self.density: float | None = None
        self.waiting: tuple[Tensor, torch.cuda.Event, int] | None = None

    def look(self, x: Tensor) -> float | None:
        """What is known now; at calls 1, 2, 4, 8 and so on a new count is asked for."""
        if _capturing(x):  # a graph replays what was known
            return self.density
        self._receive()
        self.calls += 1
        if self.calls >= self.next:
            self.next = 2 * self.calls
            self._ask(x)
        return self.density

    def _ask(self, x: Tensor) -> None:
        count = x.count_nonzero()
        if not waits(x):
            self.density = int(count) / max(1, x.numel())
            return
        if x.device.type != "cuda":
            return  # nothing tells when a copy has arrived
        arrived = torch.empty((), dtype=count.dtype, pin_memory=True).copy_(count, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self.waiting = arrived, event, x.numel()

    def _receive(self) -> None:
        if self.waiting is not None:
            count, event, size = self.waiting
            if event.query():
                self.density, self.waiting = int(count) / max(1, size), None


_seen: dict[tuple[object, ...], _Seen] = {}


def adds_rows(name: str, x: Tensor, weight: Tensor) -> bool:
    """Whether the events of ``x`` (T, B, M) are to be added row by row, weight (N, M)."""
    key = (name, x.shape[2], weight.shape[0], x.device, x.dtype)
    if len(_seen) > _MOST:
        _seen.clear()
    seen = _seen.setdefault(key, _Seen())
    known = seen.density is not None
    density = seen.look(x)
    found = density is not None and density < _limit(weight)
    if density is not None and not known:
        way = "its events are added row by row" if found else "the library multiplies it"
        log.debug("%s: %.3g %% of the input %s is not zero: %s", name, 100 * density, tuple(x.shape), way)
    return found


def _limit(weight: Tensor) -> float:
    tf32 = weight.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return next(
        limit for widest, limit in ROWS_BELOW["tf32" if tf32 else "ieee"] if weight.shape[0] <= widest
    )


def _capturing(x: Tensor) -> bool:
    return x.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
