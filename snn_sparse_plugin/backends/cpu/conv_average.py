"""Average-pools of spike events: a window with spikes is one graded event, their sum over the window's divisor.

The gradient of a window goes to all of its neurons that are active, each a share of it.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ...core.backend import PooledEvents, Shares
from ...core.convolution import Convolution
from ...core.csr import Active
from ...core.spikes import SpikeTrain
from .bits import LANES
from .conv_pool import indptr_of, most, take_marks, window_tables
from .conv_tables import windows
from .jit import kernel
from .layout import array_or_empty, numpy_type
from .memory import array
from .threads import parallel, split

Arrays = tuple[np.ndarray, ...]


@lru_cache(maxsize=64)
def _divisors(conv: Convolution) -> np.ndarray:
    return windows(conv, 1).divisor


@kernel(part=True)
def mark_windows(begin, end, indices, values, sizes, table, sums, marks):  # type: ignore[no-untyped-def]
    """Give every window with an entry a bit, and add the values there; without values each counts as one."""
    _, positions, left, _ = sizes
    first, window, _ = table
    value = sums.dtype.type(1)
    base = to = 0
    for k in range(begin, end):
        column = indices[k]
        while column >= base + positions:
            base += positions
            to += left
        if values.shape[0] > 0:
            value = values[k]
        for j in range(first[column - base], first[column - base + 1]):
            o = to + window[j]
            sums[o] += value
            marks[o >> 4] |= np.uint32(1 << (o & 15))


@kernel()
def average_rows(first, last, events, active, sizes, table, divisors, scratch, pooled, counts, shared):  # type: ignore[no-untyped-def]
    """Pooled events of rows, their active entries, and for each active entry below and window of it, where in the list
    of those its window stands."""
    indptr, indices, values = events
    active_ptr, active_indices = active
    _, positions, left, _ = sizes
    begin, window, _ = table
    sums, place, marks = scratch
    columns, grades = pooled
    listed, entries, below, above, parts = shared
    n = m = edges = 0
    none = values[:0]
    for r in range(first, last):
        mark_windows(indptr[r], indptr[r + 1], indices, values, sizes, table, sums, marks)
        start = n
        n = take_marks(marks, columns, n)
        counts[r] = n - start
        for k in range(start, n):
            grades[k] = sums[columns[k]] / divisors[columns[k] % left]
            sums[columns[k]] = 0
        if active_ptr.shape[0] == 0:
            continue
        start = m
        mark_windows(active_ptr[r], active_ptr[r + 1], active_indices, none, sizes, table, sums, marks)
        m = take_marks(marks, listed, m)
        entries[r] = m - start
        for k in range(start, m):
            place[listed[k]] = k
            sums[listed[k]] = 0
        base = to = 0
        for k in range(active_ptr[r], active_ptr[r + 1]):
            column = active_indices[k]
            while column >= base + positions:
                base += positions
                to += left
            for j in range(begin[column - base], begin[column - base + 1]):
                below[edges], above[edges] = k, place[to + window[j]]
                parts[edges] = divisors[window[j]]
                edges += 1
    return n, m, edges


@kernel()
def share_rows(first, last, sizes, windows, divisors, grad, out):  # type: ignore[no-untyped-def]
    """The gradient of rows everywhere, ``out`` (rows, N), from that of the pooled map."""
    channels, positions, left, _ = sizes
    begin, site = windows
    for r in range(first, last):
        out[r, :] = 0
        for c in range(channels):
            for o in range(left):
                part = grad[r, c * left + o] / divisors[o]
                for j in range(begin[o], begin[o + 1]):
                    out[r, c * positions + site[j]] += part


def average(conv: Convolution, train: SpikeTrain) -> PooledEvents:
    """The average-pool of ``conv``, whose map is the train itself."""
    rows, dtype = train.T * train.B, numpy_type(train.dtype)
    sizes, table = window_tables(conv)
    divisors = _divisors(conv).astype(dtype)
    events = array(train.indptr), array(train.indices), array_or_empty(train.values, dtype, 1)
    none = np.empty(0, np.int32)
    active = (none, none) if train.active is None else tuple(map(array, train.active))
    counts, entries = np.empty(rows, np.int32), np.empty(rows if train.active else 0, np.int32)
    n = sizes[0] * sizes[2]

    def run(first: int, last: int) -> Arrays:
        size = most(events, first, last, sizes) + LANES
        columns, grades = np.empty(size, np.int32), np.empty(size, dtype)
        edges = 0 if train.active is None else int(active[0][last] - active[0][first]) * sizes[3]
        listed = np.empty(0 if train.active is None else most(active, first, last, sizes) + LANES, np.int32)
        below, above = np.empty(edges, np.int32), np.empty(edges, np.int32)
        parts = np.empty(edges, dtype)
        scratch = np.zeros(n, dtype), np.empty(n, np.int32), np.zeros(-(-n // LANES), np.uint32)
        found, m, edges = average_rows(
            *(first, last, events, active, sizes, table, divisors, scratch),
            *((columns, grades), counts, (listed, entries, below, above, parts)),
        )
        made = columns[:found], grades[:found], listed[:m], below[:edges], above[:edges], parts[:edges]
        return tuple(x.copy() for x in made)

    found = parallel([lambda r=r: run(*r) for r in split(rows)])  # type: ignore[misc]
    before = 0
    for made in found:  # each range of rows counted its entries from 0
        made[4][:] += before
        before += len(made[2])
    columns, grades, listed, below, above, parts = (
        torch.from_numpy(np.concatenate(some)) for some in zip(*found, strict=True)
    )
    if train.active is None:
        return PooledEvents(indptr_of(counts), columns, values=grades)
    its = Active(indptr_of(entries), listed)
    return PooledEvents(indptr_of(counts), columns, its, values=grades, shares=Shares(below, above, parts))


def average_backward(conv: Convolution, grad: Tensor) -> Tensor:
    """The gradient (T, B, N) of a train, from that of its pool (T, B, N')."""
    T, B = grad.shape[:2]
    sizes, _ = window_tables(conv)
    found = windows(conv, 1)
    out = torch.empty(T, B, conv.in_features, dtype=grad.dtype)
    divisors = found.divisor.astype(numpy_type(grad.dtype))
    arriving, leaving = array(grad).reshape(T * B, -1), array(out).reshape(T * B, -1)

    def run(first: int, last: int) -> None:
        share_rows(first, last, sizes, (found.first, found.site), divisors, arriving, leaving)

    parallel([lambda r=r: run(*r) for r in split(T * B)])  # type: ignore[misc]
    return out
