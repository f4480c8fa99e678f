"""Which way an input is multiplied with its weight: its events are rows that are added, or a product of the library.

How many of its numbers are not zero is known on the device alone. It is counted there now and then, copied without
waiting, and believed from the call on at which the copy has arrived. Until then a dense input is multiplied by the
library, and the rows of events are added. Which is faster from where on is in :mod:`.crossovers`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from ..core import bits
from ..core.host import waits
from .crossovers import Crossovers, limit, of_device

log = logging.getLogger("snn_sparse_plugin")

_MOST = 4096  # layers and shapes that are remembered


class _Seen:
    """The density of one layer's input, as it was last read."""

    def __init__(self) -> None:
        self.calls, self.next = 0, 1
        self.density: float | None = None
        self.waiting: tuple[Tensor, torch.cuda.Event, int] | None = None

    def look(self, x: Tensor, count: Callable[[Tensor], Tensor], size: int) -> float | None:
        """What is known now; at calls 1, 2, 4, 8 and so on ``count`` of x, of ``size`` numbers, is asked for."""
        if _capturing(x):  # a graph replays what was known
            return self.density
        self._receive()
        self.calls += 1
        if self.calls >= self.next:
            self.next = 2 * self.calls
            self._ask(x, count(x), max(1, size))
        return self.density

    def _ask(self, x: Tensor, count: Tensor, size: int) -> None:
        if not waits(x):
            self.density = int(count) / size
            return
        if x.device.type != "cuda":
            return  # nothing tells when a copy has arrived
        arrived = torch.empty((), dtype=count.dtype, pin_memory=True).copy_(count, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self.waiting = arrived, event, size

    def _receive(self) -> None:
        if self.waiting is not None:
            count, event, size = self.waiting
            if event.query():
                self.density, self.waiting = int(count) / size, None


_seen: dict[tuple[object, ...], _Seen] = {}


def adds_rows(name: str, x: Tensor, weight: Tensor) -> bool:
    """Whether the events of a dense ``x`` (T, B, M) are to be added row by row, weight (N, M)."""
    table = of_device(x.device)
    limits = table.rows_below_tf32 if _tf32(weight) else table.rows_below_float32
    below = limit(limits, weight.shape[0])
    return _sparser(name, x, weight, torch.count_nonzero, below, False)


def adds_rows_of_bits(name: str, words: Tensor, weight: Tensor) -> bool:
    """The same for spikes as words (T, B, ceil(M / 32)), which bf16 terms of the weight would multiply else."""
    T, B, _ = words.shape
    table = of_device(words.device)
    if not _terms_pay(table, T * B, weight):
        return True
    return _sparser(name, words, weight, bits.count, limit(table.rows_below_terms, weight.shape[0]), True)


def _sparser(
    name: str, x: Tensor, weight: Tensor, count: Callable[[Tensor], Tensor], below: float, unknown: bool
) -> bool:
    N, M = weight.shape
    key = (name, M, N, x.device, x.dtype)
    if len(_seen) > _MOST:
        _seen.clear()
    seen = _seen.setdefault(key, _Seen())
    known = seen.density is not None
    density = seen.look(x, count, x.shape[0] * x.shape[1] * M)
    if density is None:
        return unknown
    if not known:
        product = "bf16 terms multiply it" if unknown else "the library multiplies it"
        way = "its events are added row by row" if density < below else product
        log.debug("%s: %.3g %% of the input %s is not zero: %s", name, 100 * density, tuple(x.shape), way)
    return density < below


def pairs_for_input_gradient(rows: int, weight: Tensor) -> bool:
    """Whether nu (rows, N) is to be multiplied with weight (N, M) as pairs of bf16 numbers."""
    return _terms_pay(of_device(weight.device), rows, weight)


def _terms_pay(table: Crossovers, rows: int, weight: Tensor) -> bool:
    """Whether bf16 terms beat the library's float32 product. Where TF32 is allowed they are not needed; a width that
    no tensor core is fed with well stays with the library."""
    N, M = weight.shape
    fits = weight.dtype == torch.float32 and N % 4 == 0 and not _tf32(weight)
    return fits and rows * N * M >= table.terms_from


def _tf32(weight: Tensor) -> bool:
    if weight.dtype != torch.float32:
        return False
    matmul = torch.backends.cuda.matmul
    # since torch 2.9 the precision has a name, and the older setting raises where somebody gave one
    precision = getattr(matmul, "fp32_precision", None)
    return matmul.allow_tf32 if precision is None else precision == "tf32"


def _capturing(x: Tensor) -> bool:
    return x.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
