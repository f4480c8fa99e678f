"""E-prop of any elementwise neuron, a chunk of steps at a time: the scan back, and sums over events with their traces.

``learners/eprop/scan.py`` holds the specification of the scan, ``learners/eprop/rule.py`` the equations of the traces.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from .jit import kernel
from .outgoing import sort_events
from .threads import parallel, split


@kernel(forceinline=True)
def _scale_add(out, o, factor, x, i):  # type: ignore[no-untyped-def]
    """``out[o] += factor * x[i]``"""
    o, i = np.uint32(o), np.uint32(i)
    for j in range(out.shape[1]):
        out[o, j] += factor * x[i, j]


@kernel(part=True)
def _add_rows(out, k, x, indices, values, first, last):  # type: ignore[no-untyped-def]
    """``add_rows`` of :mod:`.rows`, in its order, for rows that are no whole vectors."""
    N, k, e = out.shape[1], np.uint32(k), first
    if values.shape[0] > 0:
        while e < last:
            a = np.uint32(indices[e])
            for j in range(N):
                out[k, j] += values[e] * x[a, j]
            e += 1
        return
    while e + 4 <= last:
        a, b = np.uint32(indices[e]), np.uint32(indices[e + 1])
        c, d = np.uint32(indices[e + 2]), np.uint32(indices[e + 3])
        for j in range(N):
            out[k, j] += (x[a, j] + x[b, j]) + (x[c, j] + x[d, j])
        e += 4
    while e < last:
        a = np.uint32(indices[e])
        for j in range(N):
            out[k, j] += x[a, j]
        e += 1


@kernel(allocates=True)
def _scan(  # type: ignore[no-untyped-def]
    first,  # samples first..last
    last,
    B,
    varying,  # (V K B, N): derivatives that vary
    numbers,  # (1 + d, 1 + d): those that are one number
    table,  # (1 + d, 1 + d): which of the varying ones an entry is, -1: a number
    A,  # (m, m), the readout's memory
    b_r,  # (m,)
    out,
    filtered,  # (K B, N)
    direct,
    lanes,
    nu,  # out (B targets K, N)
    start,  # out (targets (d + m) B, N)
):
    N = filtered.shape[1]
    K = filtered.shape[0] // B
    wide, m, targets = table.shape[0], b_r.shape[0], lanes.shape[0] + 1
    dtype = filtered.dtype
    zero, one = dtype.type(0), dtype.type(1)
    size = wide + m  # rows of a target: z, the states, the readout's memory
    now, before = np.zeros((targets * size, N), dtype), np.zeros((size, N), dtype)
    onto = (wide + out) if m > 0 else 0
    for b in range(first, last):
        for r in range(targets * size):
            row = np.uint32(r)
            for j in range(N):
                now[row, j] = zero
        for k in range(lanes.shape[0]):
            row = np.uint32((k + 1) * size + 1 + lanes[k])
            for j in range(N):
                now[row, j] = one
        for back in range(K):
            t = K - 1 - back
            at = t * B + b
            _scale_add(now, 0, one, direct, at)
            _scale_add(now, onto, one, filtered, at)
            for k in range(targets):
                base = k * size
                for p in range(m):
                    if b_r[p] != zero:
                        _scale_add(now, base, b_r[p], now, base + wide + p)
                for c in range(size):
                    row = np.uint32(c)
                    for j in range(N):
                        before[row, j] = zero
                for r in range(wide):
                    for c in range(wide):
                        v = table[r, c]
                        if v >= 0:
                            entry = np.uint32((v * K + t) * B + b)
                            row, source = np.uint32(c), np.uint32(base + r)
                            for j in range(N):
                                before[row, j] += varying[entry, j] * now[source, j]
                        elif numbers[r, c] != zero:
                            _scale_add(before, c, numbers[r, c], now, base + r)
                for p in range(m):
                    for q in range(m):
                        if A[p, q] != zero:
                            _scale_add(before, wide + q, A[p, q], now, base + wide + p)
                found, row = np.uint32((b * targets + k) * K + t), np.uint32(base)
                for j in range(N):
                    nu[found, j] = before[0, j]
                    now[row, j] = zero
                for c in range(1, size):
                    row, source = np.uint32(base + c), np.uint32(c)
                    for j in range(N):
                        now[row, j] = before[source, j]
        for k in range(targets):
            for c in range(size - 1):
                found, row = np.uint32((k * (size - 1) + c) * B + b), np.uint32(k * size + 1 + c)
                for j in range(N):
                    start[found, j] = now[row, j]


def scan(
    varying: Sequence[Tensor],
    numbers: Tensor,
    table: Tensor,
    A: Tensor,
    b: Tensor,
    out: int,
    filtered: Tensor,
    direct: Tensor,
    lanes: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """nu (targets, K, B, N) and start (targets, components, B, N); see ``learners/eprop/scan.py``."""
    K, B, N = filtered.shape
    targets, n = 1 + len(lanes), len(table) - 1 + len(b)
    nu, start = filtered.new_empty(B, targets, K, N), filtered.new_empty(targets, n, B, N)
    packed = torch.stack([*varying]) if varying else filtered.new_empty(0, K, B, N)
    rows = [x.contiguous().view(-1, N).numpy() for x in (packed, filtered, direct, nu, start)]
    small = [x.contiguous().numpy() for x in (numbers, table, A, b)]
    chosen = np.array(lanes, np.int64)

    def task(part: tuple[int, int]) -> None:
        _scan(*part, B, rows[0], *small, out, *rows[1:3], chosen, *rows[3:])

    parallel([lambda part=part: task(part) for part in split(B)])  # type: ignore[misc]
    return nu.transpose(0, 1).transpose(1, 2), start


@kernel(allocates=True)
def _sum_and_carry(  # type: ignore[no-untyped-def]
    first,
    last,
    K,
    ptr,  # events of sample b and step t: row b K + t
    indices,
    values,
    nu,  # (B, 1 + lanes, K, N)
    start,  # (1 + lanes, components, B, N)
    shared,  # (S, B, M): traces per input
    shared_at,  # (S,): their components
    own,  # (O, B, M, N): traces per synapse, in and, with carry, out
    own_at,  # (O,)
    carry,
    out,  # (M, N): the gradient is added
):
    M, N = out.shape
    dtype = nu.dtype
    zero = dtype.type(0)
    S, O, targets = shared.shape[0], own.shape[0], start.shape[0]  # noqa: E741
    fresh = np.zeros((O, N), dtype)
    acts = np.zeros((targets, start.shape[1]), np.bool_)
    for b in range(first, last):
        at = np.uint64(b)
        for k in range(targets):
            for c in range(start.shape[1]):
                total = zero
                for j in range(N):
                    total += abs(start[k, c, at, j])
                acts[k, c] = total != zero
        starts, rows, scaled = sort_events(M, b * K, b * K + K, 0, ptr, indices, values)
        loss = nu[at, 0]
        for i in range(M):
            row = np.uint64(i)
            some = starts[i + 1] > starts[i]
            for s in range(S):
                trace, c = shared[s, at, row], shared_at[s]
                if trace != zero and acts[0, c]:
                    for j in range(N):
                        out[row, j] += start[0, c, at, j] * trace
            for o in range(O):
                c = own_at[o]
                if acts[0, c]:
                    for j in range(N):
                        out[row, j] += start[0, c, at, j] * own[o, at, row, j]
            if some:
                _add_rows(out, i, loss, rows, scaled, starts[i], starts[i + 1])
            if not carry:
                continue
            for o in range(O):
                for j in range(N):
                    fresh[o, j] = zero
                for s in range(S):
                    trace, c = shared[s, at, row], shared_at[s]
                    if trace != zero and acts[o + 1, c]:
                        for j in range(N):
                            fresh[o, j] += start[o + 1, c, at, j] * trace
                for q in range(O):
                    c = own_at[q]
                    if acts[o + 1, c]:
                        for j in range(N):
                            fresh[o, j] += start[o + 1, c, at, j] * own[q, at, row, j]
                if some:
                    _add_rows(fresh, o, nu[at, o + 1], rows, scaled, starts[i], starts[i + 1])
            for o in range(O):
                for j in range(N):
                    own[o, at, row, j] = fresh[o, j]


def sum_and_carry(
    events: tuple[Tensor, Tensor, Tensor | None],
    nu: Tensor,
    start: Tensor,
    shared: Sequence[tuple[int, Tensor]],
    own: Tensor,
    own_at: Sequence[int],
    carry: bool,
) -> Tensor:
    """The gradient (M, N) of a weight matrix that got some events; its traces per synapse move on by the chunk.

    Args:
        events: ptr, columns and values (None: ones), row ``b K + t`` being those of sample b and step t.
        nu, start: of :func:`scan`; target ``1 + k`` is that of ``own[k]``.
        shared: traces per input (B, M), with their components.
        own: traces per synapse, (O, B, M, N), changed in place; ``own_at`` their components.
        carry: False: they stay as they are.
    """
    B, K, M, N = own.shape[1], nu.shape[1], own.shape[2], own.shape[3]
    rows = nu.permute(2, 0, 1, 3).contiguous()  # as scan has made it, so no copy
    ptr, indices, values = events
    given = values if values is not None else nu.new_empty(0)
    traces = torch.stack([x for _, x in shared]) if shared else nu.new_empty(0, B, M)
    places = [np.array(x, np.int64) for x in ([c for c, _ in shared], list(own_at))]
    arrays = [x.numpy() for x in (ptr, indices, given, rows, start)]

    def task(part: tuple[int, int]) -> Tensor:
        out = nu.new_zeros(M, N)
        _sum_and_carry(
            *part, K, *arrays, traces.numpy(), places[0], own.numpy(), places[1], carry, out.numpy()
        )
        return out

    tasks: list[Callable[[], Tensor]] = [lambda part=part: task(part) for part in split(B)]  # type: ignore[misc]
    first, *others = parallel(tasks)
    for other in others:
        first += other
    return first
