"""Max-pools of spike events: a window spikes where one of its neurons does, and its gradient goes to that neuron.

As torch has it, the first maximum of a window takes the gradient: the first spike or, in a silent window, the first
place inside the map.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ...core.backend import PooledEvents
from ...core.convolution import Convolution
from ...core.csr import Active
from ...core.spikes import SpikeTrain
from .bits import LANES, append_columns
from .conv_tables import Windows, windows
from .jit import kernel
from .memory import array
from .threads import parallel, split

Arrays = tuple[np.ndarray, ...]


@lru_cache(maxsize=64)
def window_tables(conv: Convolution) -> tuple[tuple[int, int, int, int], Arrays]:
    """Channels, positions, windows of a channel, the most windows at a position; where each position's windows begin,
    those windows, and the first place of each window."""
    found: Windows = windows(conv, 1)
    positions, left = conv.in_features // conv.in_channels, len(found.first) - 1
    of_window = np.repeat(np.arange(left, dtype=np.int32), np.diff(found.first))
    order = np.argsort(found.site, kind="stable")
    counts = np.bincount(found.site, minlength=positions)
    begin = np.concatenate([[0], counts.cumsum()]).astype(np.int32)
    sizes = conv.in_channels, positions, left, int(counts.max(initial=0))
    return sizes, (begin, of_window[order], found.site[found.first[:-1]])


@kernel(part=True)
def find_winners(begin, end, indices, sizes, table, winners, marks):  # type: ignore[no-untyped-def]
    """The first spike of each window of a row, -1 where there is none; ``marks`` gets a bit for each that has one."""
    _, positions, left, _ = sizes
    first, window, _ = table
    winners[:] = -1
    base = to = 0
    for k in range(begin, end):
        column = indices[k]
        while column >= base + positions:
            base += positions
            to += left
        for j in range(first[column - base], first[column - base + 1]):
            o = to + window[j]
            if winners[o] < 0:
                winners[o] = column
                marks[o >> 4] |= np.uint32(1 << (o & 15))


@kernel(part=True)
def take_marks(marks, out, n):  # type: ignore[no-untyped-def]
    """Append the columns whose bits are set, in their order, and clear the bits."""
    for word in range(marks.shape[0]):
        if marks[word] != 0:
            n = append_columns(marks[word], word * LANES, out, n)
            marks[word] = 0
    return n


@kernel()
def pool_rows(first, last, events, active, sizes, table, scratch, pooled, counts, listed, sources, entries):  # type: ignore[no-untyped-def]
    """Pooled events of rows, and their active entries, each with the entry below that its gradient goes to."""
    indptr, indices = events
    active_ptr, active_indices = active
    _, positions, left, _ = sizes
    begin, window, place = table
    winners, source, marks = scratch
    n = m = 0
    for r in range(first, last):
        find_winners(indptr[r], indptr[r + 1], indices, sizes, table, winners, marks)
        start = n
        n = take_marks(marks, pooled, n)
        counts[r] = n - start
        if active_ptr.shape[0] == 0:
            continue
        base = to = 0
        for k in range(active_ptr[r], active_ptr[r + 1]):
            column = active_indices[k]
            while column >= base + positions:
                base += positions
                to += left
            p = column - base
            for j in range(begin[p], begin[p + 1]):
                o = to + window[j]
                if winners[o] == column or (winners[o] < 0 and place[window[j]] == p):
                    source[o] = k
                    marks[o >> 4] |= np.uint32(1 << (o & 15))
        start = m
        m = take_marks(marks, listed, m)
        entries[r] = m - start
        for k in range(start, m):
            sources[k] = source[listed[k]]
    return n, m


@kernel()
def return_rows(first, last, T, B, events, sizes, table, scratch, grad, out):  # type: ignore[no-untyped-def]
    """The gradient of rows (b, t) everywhere, ``out`` (T · B, N), from that of the pooled map."""
    indptr, indices = events
    channels, positions, left, _ = sizes
    _, _, place = table
    winners, _, marks = scratch
    for r in range(first, last):
        find_winners(indptr[r], indptr[r + 1], indices, sizes, table, winners, marks)
        at = (r % T) * B + r // T
        out[at, :] = 0
        for c in range(channels):
            for o in range(left):
                k = c * left + o
                to = winners[k] if winners[k] >= 0 else c * positions + place[o]
                out[at, to] += grad[at, k]


def pool(conv: Convolution, train: SpikeTrain) -> PooledEvents:
    """The pool of ``conv``, whose map is the train itself, of a binary train."""
    rows = train.T * train.B
    sizes, table = window_tables(conv)
    events = array(train.indptr), array(train.indices)
    none = np.empty(0, np.int32)
    active = (none, none) if train.active is None else tuple(map(array, train.active))
    counts, entries = np.empty(rows, np.int32), np.empty(rows if train.active else 0, np.int32)

    def run(first: int, last: int) -> Arrays:
        pooled = np.empty(most(events, first, last, sizes) + LANES, np.int32)
        size = 0 if train.active is None else most(active, first, last, sizes) + LANES
        listed, sources = np.empty(size, np.int32), np.empty(size, np.int32)
        n, m = pool_rows(
            *(first, last, events, active, sizes, table, _scratch(sizes)),
            *(pooled, counts, listed, sources, entries),
        )
        return pooled[:n], listed[:m], sources[:m]

    parts = parallel([lambda r=r: run(*r) for r in split(rows)])  # type: ignore[misc]
    indices, listed, sources = (torch.from_numpy(np.concatenate(some)) for some in zip(*parts, strict=True))
    if train.active is None:
        return PooledEvents(indptr_of(counts), indices)
    return PooledEvents(indptr_of(counts), indices, Active(indptr_of(entries), listed), sources)


def pool_backward(conv: Convolution, train: SpikeTrain, grad: Tensor) -> Tensor:
    """The gradient (T, B, N) of a train, from that of its pool (T, B, N')."""
    T, B = train.shape[:2]
    sizes, table = window_tables(conv)
    out = torch.empty(T, B, train.features, dtype=grad.dtype)
    events = array(train.indptr), array(train.indices)
    arriving, leaving = array(grad).reshape(T * B, -1), array(out).reshape(T * B, -1)

    def run(first: int, last: int) -> None:
        return_rows(first, last, T, B, events, sizes, table, _scratch(sizes), arriving, leaving)

    parallel([lambda r=r: run(*r) for r in split(T * B)])  # type: ignore[misc]
    return out


def most(pattern: Arrays, first: int, last: int, sizes: tuple[int, ...]) -> int:
    """How many windows the entries of these rows can reach at most."""
    rows = (last - first) * sizes[0] * sizes[2]
    return min(rows, int(pattern[0][last] - pattern[0][first]) * sizes[3])


def _scratch(sizes: tuple[int, ...]) -> Arrays:
    """The winner of each window of a row, which active entry that is, and bits of windows."""
    n = sizes[0] * sizes[2]
    return np.empty(n, np.int32), np.empty(n, np.int32), np.zeros(-(-n // LANES), np.uint32)


def indptr_of(counts: np.ndarray) -> Tensor:
    out = np.zeros(len(counts) + 1, np.int32)
    np.cumsum(counts, out=out[1:])
    return torch.from_numpy(out)
