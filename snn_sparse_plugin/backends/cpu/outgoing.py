"""What leaves a layer in its backward: gradients of weights, biases and input, from nu = dE/d(input current).

The adjoint kernels fill a block of nu rows, one per (sample, step) in the order of ``indptr``, and deliver it when it
is full, while it is still in cache. Rows are padded to whole vectors with zeros.
"""

from __future__ import annotations

import numpy as np

from .bits import LANES
from .jit import kernel
from .lanes import add, fma, load, splat, store, totals, zeros
from .rows import add_rows

BLOCK_ITEMS = 1 << 17  # of the block: 512 KiB of float32, half of the second-level cache

_inlined = kernel(forceinline=True)


def block_rows(n: int) -> int:
    """How many rows of ``n`` neurons make a block."""
    return max(16, min(512, BLOCK_ITEMS // max(n, 1)))


@kernel(part=True, allocates=True)
def new_rows(rows, columns, like):  # type: ignore[no-untyped-def]
    """Of the dtype of an array: one way to make rows for all parts here, as each is compiled, too."""
    return np.empty((rows, columns), like.dtype)


@kernel(part=True)
def deliver(  # type: ignore[no-untyped-def]
    block,  # (rows, N padded): from row ``first`` on nu of r = b * T + t
    first,
    low,
    high,  # the rows low..high are delivered
    T,
    incoming,
    outgoing,
):
    """Add a block of nu rows to everything that wants it but what is recurrent.

    Numbers are given as variables, as a part is compiled for each literal.
    """
    indptr, indices, values, weight, in_ptr, in_idx, _, _ = incoming
    g_weight, g_bias, g_active, g_current, _, _, _ = outgoing
    if g_weight.shape[0] > 0:
        add_by_column(g_weight, indptr, indices, values, low, high, block, first)
    if g_bias.shape[0] > 0:
        add_all(g_bias, block, first, high - low)
    if g_active.shape[0] > 0:
        dots(weight, in_idx, in_ptr, low, high, block, first, g_active)
    if g_current.shape[0] > 0:
        N, still = g_current.shape[2], g_current.shape[0] == 1  # one current for all steps: theirs add up
        for r in range(low, high):
            k, t, b = np.uint64(first + r - low), np.uint64(r % T), np.uint64(r // T)
            if still:
                for j in range(N):
                    g_current[0, b, j] += block[k, j]
            else:
                for j in range(N):
                    g_current[t, b, j] = block[k, j]


@kernel(part=True, allocates=True)
def deliver_recurrent(block, first, low, high, T, incoming, outgoing):  # type: ignore[no-untyped-def]
    """The rest of :func:`deliver`: spikes of step t - 1 drove the recurrent input of step t, rec0 that of the first."""
    _, _, _, _, _, _, out_ptr, out_idx = incoming
    _, _, _, _, g_rec_weight, g_rec_bias, g_rec0 = outgoing
    r = low
    while r < high:
        until = min(high, (r // T + 1) * T)  # of this sample
        if r % T == 0:
            for j in range(g_rec0.shape[1]):
                g_rec0[r // T, j] = block[first + r - low, j]
            r += 1
        k = first + r - low
        if g_rec_weight.shape[0] > 0:
            rows = rows_of_entries(out_ptr, out_idx, r - 1, until - 1, k)
            add_rows_at(g_rec_weight, out_idx, out_ptr[r - 1], out_ptr[until - 1], block, rows)
        if g_rec_bias.shape[0] > 0:
            add_all(g_rec_bias, block, k, until - r)
        r = until


@kernel(forceinline=True, allocates=True)
def rows_of_entries(ptr, indices, low, high, first):  # type: ignore[no-untyped-def]
    """(1, entries), int32 as ``indices``: the row of the block that each entry of the rows low..high belongs to.

    Whole vectors are written and overwritten: one loop over all entries that knows their rows has no branch that
    depends on how many a row has, and such branches cost more than what they guard.
    """
    begin = ptr[low]
    rows = new_rows(1, ptr[high] - begin + LANES, indices)
    for r in range(low, high):
        at, end = ptr[np.uint64(r)] - begin, ptr[np.uint64(r + 1)] - begin
        k = splat(np.int32(first + r - low))
        while True:
            store(rows, 0, at, k)
            at += LANES
            if at >= end:
                break
    return rows


@_inlined
def add_rows_at(out, indices, begin, end, block, rows):  # type: ignore[no-untyped-def]
    """``out[indices[e]] += block[rows[e]]`` for the entries begin..end."""
    width = np.uint64(out.shape[1])
    for e in range(begin, end):
        i, k = np.uint64(indices[np.uint64(e)]), np.uint64(rows[0, np.uint64(e - begin)])
        j = np.uint64(0)
        while j < width:
            store(out, i, j, add(load(out, i, j), load(block, k, j)))
            j += np.uint64(LANES)


@kernel(part=True, allocates=True)
def sort_events(m, low, high, first, ptr, indices, values):  # type: ignore[no-untyped-def]
    """The entries of the rows low..high by column: where those of each of the m columns begin, their rows, of which
    ``low`` is called ``first``, and their values if any."""
    begin, end = ptr[low], ptr[high]
    rows = rows_of_entries(ptr, indices, low, high, first)
    # where column c begins stands at c + 1 until its entries have come, as it is then where c + 1 begins
    starts = new_rows(1, m + 2, indices)[0]
    for k in range(m + 2):
        starts[k] = 0
    for e in range(begin, end):
        starts[np.uint64(indices[np.uint64(e)]) + np.uint64(2)] += 1
    for k in range(m):
        starts[k + 2] += starts[k + 1]
    owners = new_rows(1, end - begin, indices)[0]
    ordered = new_rows(1, end - begin if values.shape[0] > 0 else 0, values)[0]
    for e in range(begin, end):
        following = np.uint64(indices[np.uint64(e)]) + np.uint64(1)
        at = np.uint64(starts[following])
        owners[at] = rows[0, np.uint64(e - begin)]
        if values.shape[0] > 0:
            ordered[at] = values[np.uint64(e)]
        starts[following] += 1
    return starts, owners, ordered


@kernel(part=True, allocates=True)
def add_by_column(out, ptr, indices, values, low, high, block, first):  # type: ignore[no-untyped-def]
    """``out[indices[e]] += values[e] * block[first + r - low]`` for each entry e of each row r of low..high; no values:
    ones.

    In the order of their columns, so that each row of ``out``, which may be larger than a cache, is read and written
    once. With two entries for each column that takes 0.7, with twenty 0.5 of the time; with one as long.
    """
    starts, rows, ordered = sort_events(out.shape[0], low, high, first, ptr, indices, values)
    for m in range(out.shape[0]):
        if starts[m + 1] > starts[m]:
            add_rows(out, m, block, rows, ordered, starts[m], starts[m + 1])


@_inlined
def add_all(out, block, first, count):  # type: ignore[no-untyped-def]
    """``out[0] += block[first : first + count].sum(0)``"""
    width, j = np.uint64(out.shape[1]), np.uint64(0)
    while j < width:
        x = load(out, 0, j)
        for k in range(first, first + count):
            x = add(x, load(block, k, j))
        store(out, 0, j, x)
        j += np.uint64(LANES)


@_inlined
def dots(weight, indices, ptr, low, high, block, first, out):  # type: ignore[no-untyped-def]
    """``out[e] = weight[indices[e]] @ block[row of e]``, four entries of a row at a time to load the row once.

    Entries beyond the last of a row are the last one again: cheaper than a branch on how many are left.
    """
    width = np.uint64(weight.shape[1])
    for r in range(low, high):
        k = np.uint64(first + r - low)
        e, last = np.int64(ptr[np.uint64(r)]), np.int64(ptr[np.uint64(r + 1)]) - 1
        while e <= last:
            at = (
                np.uint64(e),
                np.uint64(min(e + 1, last)),
                np.uint64(min(e + 2, last)),
                np.uint64(min(e + 3, last)),
            )
            a, b = np.uint64(indices[at[0]]), np.uint64(indices[at[1]])
            c, d = np.uint64(indices[at[2]]), np.uint64(indices[at[3]])
            p, q, s, t = zeros(weight), zeros(weight), zeros(weight), zeros(weight)
            j = np.uint64(0)
            while j < width:
                x = load(block, k, j)
                p = fma(load(weight, a, j), x, p)
                q = fma(load(weight, b, j), x, q)
                s = fma(load(weight, c, j), x, s)
                t = fma(load(weight, d, j), x, t)
                j += np.uint64(LANES)
            out[at[0]], out[at[1]], out[at[2]], out[at[3]] = totals(p, q, s, t)
            e += 4
