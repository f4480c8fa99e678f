"""Dense spikes to events, in one pass over the dense tensor."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ...core.csr import MAX_EVENTS
from ...core.errors import InputError
from .bits import HAS_AVX512, LANES, append_columns, fetch, nonzero16, ones16
from .jit import kernel
from .memory import array
from .threads import WAKING, parallel, split

# Reading so many numbers takes less time than it takes to wake a thread.
SMALLEST = 1 << 18
# Numbers to read ahead of those that are looked at: the processor itself does not look beyond a page.
FAR = 1 << 10
# Seconds to read a number, and to put the events of a row in order.
NUMBER, ROW = 3.5e-10, 3.5e-8


@kernel()
def scan_rows(x, first, last, T, B, counts, out, n):  # type: ignore[no-untyped-def]
    """Append the nonzero columns of rows first..last to ``out``; stop where it is full.

    Row ``b * T + t``, of step t and sample b, is ``t * B + b`` in memory; with T = B = 1 they are in memory order.

    Also returns whether every value seen is 1: checked here, while the row is in cache.
    """
    M = x.shape[1]
    whole = M - M % LANES
    other = np.uint32(0)
    at = (first % T) * B + first // T
    for r in range(first, last):
        if n + M + LANES > out.shape[0]:
            return r, n, other == 0
        row = x[at]
        at += B
        if at >= T * B:
            at -= T * B - 1
        start = n
        for k in range(0, whole, LANES):
            fetch(row, k + FAR)
            mask = nonzero16(row, k)
            # to guess which vectors have none takes longer than to pack none
            if HAS_AVX512 or mask != 0:
                other |= mask ^ ones16(row, k)
                n = append_columns(mask, k, out, n)
        for column in range(whole, M):
            if row[column] != 0:
                other |= np.uint32(row[column] != 1)
                out[n] = column
                n += 1
        counts[r] = n - start
    return last, n, other == 0


@kernel()
def place_rows(first, last, T, B, found, n, indptr, indices):  # type: ignore[no-untyped-def]
    """Copy events found in memory order (t, b), those of row ``first`` from ``n`` on, to row order (b, t)."""
    for r in range(first, last):
        target = (r % B) * T + r // B
        for k in range(indptr[target], indptr[target + 1]):
            indices[k] = found[n]
            n += 1


@kernel()
def _values(x, first, last, T, B, indptr, indices, values):  # type: ignore[no-untyped-def]
    for r in range(first, last):
        target = (r % B) * T + r // B
        for k in range(indptr[target], indptr[target + 1]):
            values[k] = x[r, indices[k]]


class Found(NamedTuple):
    """Events of rows ``first`` to ``last`` in memory order: their columns, and whether all values are 1."""

    first: int
    last: int
    columns: np.ndarray
    binary: bool


def _scan(
    x: np.ndarray, first: int, last: int, counts: np.ndarray, T: int = 1, B: int = 1, most: int = MAX_EVENTS
) -> Found:
    """What :func:`scan_rows` finds, with room for all; it ends early where there are more than ``most``."""
    M = x.shape[1]
    out = np.empty((last - first) * M // 16 + M + LANES, dtype=np.int32)
    at, n, binary = scan_rows(x, first, last, T, B, counts, out, 0)
    while at < last and n <= most:
        grown = np.empty(2 * out.size + M + LANES, dtype=np.int32)
        grown[:n] = out[:n]
        out = grown
        at, n, more = scan_rows(x, at, last, T, B, counts, out, n)
        binary &= more
    return Found(first, last, out[:n], binary)


def events_from_dense(x: Tensor, begun: Begun | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """indptr, indices (int32) and values (None where all are 1) of a dense CPU tensor (T, B, N...).

    ``begun``: what has been found in its first rows already.
    """
    if begun is None and x.numel() <= SMALLEST:
        return few_events(x, x.numel())  # type: ignore[return-value]
    T, B = x.shape[:2]
    rows = array(x, (T * B, x.numel() // (T * B)))
    ordered = None if begun is None else begun.ordered(rows, T)
    indptr, indices, binary = _search(rows, T, B, begun) if ordered is None else ordered
    values = None if binary else _values_of(rows, T, B, indptr, indices)
    return torch.from_numpy(indptr), torch.from_numpy(indices), values


def few_events(x: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """:func:`events_from_dense` of a tensor of up to :data:`SMALLEST` numbers; None where more than ``most``
    of them are not 0.

    The rows are read in the order that events have, which costs where they come from memory, and so in a single pass.
    """
    T, B = x.shape[:2]
    rows = array(x, (T * B, x.numel() // (T * B)))
    counts = np.empty(T * B, np.int32)
    found = _scan(rows, 0, T * B, counts, T, B, most)
    if found.columns.size > most:
        return None
    indptr, indices = np.zeros(T * B + 1, np.int32), found.columns.copy()
    np.cumsum(counts, dtype=np.int32, out=indptr[1:])
    values = None if found.binary else _values_of(rows, T, B, indptr, indices)
    return torch.from_numpy(indptr), torch.from_numpy(indices), values


def _values_of(rows: np.ndarray, T: int, B: int, indptr: np.ndarray, indices: np.ndarray) -> Tensor:
    values = np.empty(indices.size, dtype=rows.dtype)
    ranges = split(T * B, 1 if rows.size <= SMALLEST else None)
    parallel([lambda r=r: _values(rows, *r, T, B, indptr, indices, values) for r in ranges])
    return torch.from_numpy(values)


def _search(rows: np.ndarray, T: int, B: int, begun: Begun | None) -> tuple[np.ndarray, np.ndarray, bool]:
    """indptr and indices, and whether all values are 1."""
    counts, few = np.zeros(T * B, dtype=np.int32), 1 if rows.size <= SMALLEST else None
    parts = [] if begun is None else begun.end(rows, counts)
    at = parts[-1].last if parts else 0
    if at < T * B:
        rest = split(T * B - at, few, round(WAKING / (NUMBER * rows.shape[1])))
        parts += parallel([lambda r=r: _scan(rows, at + r[0], at + r[1], counts) for r in rest])
    total = sum(part.columns.size for part in parts)
    if total > MAX_EVENTS:
        raise InputError(f"input has {total} events, at most {MAX_EVENTS} fit; split the batch.")
    indptr = np.zeros(T * B + 1, dtype=np.int32)
    counts.reshape(T, B).T.cumsum(out=indptr[1:])
    indices = np.empty(total, dtype=np.int32)

    def place(first: int, last: int) -> None:
        for part in parts:
            start, stop = max(first, part.first), min(last, part.last)
            if start < stop:
                before = int(counts[part.first : start].sum())
                place_rows(start, stop, T, B, part.columns, before, indptr, indices)

    parallel([lambda r=r: place(*r) for r in split(T * B, few, round(WAKING / ROW))])
    return indptr, indices, all(part.binary for part in parts)


def share_of_nonzeros(x: Tensor, every: int) -> float:
    """The share of numbers other than 0 in each ``every``-th row of a contiguous CPU tensor (T, B, N)."""
    T, B, N = x.shape
    sample = array(x, (T * B, N))[::every] != 0
    return np.count_nonzero(sample) / sample.size


class Begun(Protocol):
    """A search for events that began before the tensor was complete."""

    def end(self, rows: np.ndarray, counts: np.ndarray) -> list[Found]:
        """End it: -> what it found in the first of these rows, in order and without gaps, if it was they that it
        looked at. Puts the number of events of each of them into ``counts``.
        """
        ...

    def has_found_few(self, x: Tensor) -> bool:
        """Whether it has put all events of this tensor (T, B, N...) in order, and they are few."""
        ...

    def ordered(self, rows: np.ndarray, T: int) -> tuple[np.ndarray, np.ndarray, bool] | None:
        """indptr, indices and whether all values are 1, if it has put the events of all these rows in order."""
        ...
