"""Dense spikes to events, in one pass over the dense tensor."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...errors import InputError
from ...spikes import MAX_EVENTS
from .bits import LANES, append_columns, nonzero16, ones16
from .jit import kernel
from .threads import parallel, split


@kernel()
def _scan(x, first, last, T, B, counts, out, n):  # type: ignore[no-untyped-def]
    """Append the nonzero columns of rows first..last (in memory order) to ``out``; stop where it is full.

    Also returns whether every value seen is 1: checked here, while the row is in cache.
    """
    M = x.shape[1]
    whole = M - M % LANES
    binary = True
    for r in range(first, last):
        if n + M + LANES > out.shape[0]:
            return r, n, binary
        row = x[r]
        start = n
        for k in range(0, whole, LANES):
            mask = nonzero16(row, k)
            if mask != 0:
                binary &= mask == ones16(row, k)
                n = append_columns(mask, k, out, n)
        for column in range(whole, M):
            if row[column] != 0:
                binary &= row[column] == 1
                out[n] = column
                n += 1
        counts[(r % B) * T + r // B + 1] = n - start
    return last, n, binary


@kernel()
def _place(first, last, T, B, found, indptr, indices):  # type: ignore[no-untyped-def]
    """Copy events found in memory order (t, b) to row order (b, t)."""
    n = 0
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


def events_from_dense(x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """indptr, indices (int32) and values (None where all are 1) of a dense CPU tensor (T, B, N...)."""
    T, B = x.shape[:2]
    rows = x.reshape(T * B, -1).contiguous().numpy()
    counts = np.zeros(T * B + 1, dtype=np.int64)
    M = rows.shape[1]

    def scan(first: int, last: int) -> tuple[np.ndarray, bool]:
        out = np.empty((last - first) * M // 16 + M + LANES, dtype=np.int32)
        at, n, binary = _scan(rows, first, last, T, B, counts, out, 0)
        while at < last:
            grown = np.empty(2 * out.size + M + LANES, dtype=np.int32)
            grown[:n] = out[:n]
            out = grown
            at, n, more = _scan(rows, at, last, T, B, counts, out, n)
            binary &= more
        return out[:n], binary

    ranges = split(T * B)
    found = parallel([lambda r=r: scan(*r) for r in ranges])
    total = sum(part.size for part, _ in found)
    if total > MAX_EVENTS:
        raise InputError(f"input has {total} events, at most {MAX_EVENTS} fit; split the batch.")
    indptr = np.cumsum(counts).astype(np.int32)
    indices = np.empty(total, dtype=np.int32)
    parallel(
        [
            lambda r=r, part=part: _place(*r, T, B, part, indptr, indices)
            for r, (part, _) in zip(ranges, found, strict=True)
        ]
    )
    graded = None
    if not all(binary for _, binary in found):
        values = np.empty(total, dtype=rows.dtype)
        parallel([lambda r=r: _values(rows, *r, T, B, indptr, indices, values) for r in ranges])
        graded = torch.from_numpy(values)
    return torch.from_numpy(indptr), torch.from_numpy(indices), graded
