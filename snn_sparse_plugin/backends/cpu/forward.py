"""Forward kernel: the whole time loop of a range of samples, state in cache, spikes leave as events."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np

from ...core.backend import CHUNK
from .bits import LANES, above16, append_columns, count_bits, pick_values, within16
from .jit import kernel
from .layout import zero_rows
from .rows import (
    DISTANCE,
    IN,
    OWN,
    REC,
    RESET,
    ROWS,
    SYNAPTIC,
    THRESHOLD,
    Code,
    V,
    add_rows,
    advance_kernel,
    copy_row,
    fill_rows,
    from_bias,
    is_plain,
    load2,
    load3,
    plain_step,
    shared,
    store2,
    store3,
)


@cache
def forward_kernel(code: Code, dtype: np.dtype) -> Callable[..., Any]:
    """The forward of one member of the neuron family; its branches are resolved at compile time."""
    member, subtracts = shared(code)
    return partial(_with_rows, _forward_kernel(member, dtype), subtracts)


def _with_rows(
    run: Callable[..., int],
    subtracts: bool,
    first: int,
    last: int,
    T: int,
    window: float,
    params: Any,
    *args: Any,
) -> int:
    rows = zero_rows(ROWS, params.shape[1], params.dtype)  # a thread's own: made at every call
    return run(rows, subtracts, first, last, T, window, params, *args)


@cache
def _forward_kernel(code: Code, dtype: np.dtype) -> Callable[..., Any]:
    _, synapse, _, _, _, _, spiking, recurrent = code
    pick, plain, advance, step = pick_values(dtype), is_plain(code), advance_kernel(code), plain_step(synapse)

    @kernel()
    def forward(  # type: ignore[no-untyped-def]
        rows,  # its own, zeros
        subtracts,  # whether a reset by subtraction is one
        first,
        last,
        T,
        window,  # half-width of the active window, < 0: nothing is active
        params,  # (5, N)
        fed,
        states,
        written,
    ):
        """Returns the sample it stopped before: ``last``, or earlier where a buffer could overflow."""
        current, indptr, indices, values, weight, bias, rec_weight, rec_bias, rec0 = fed
        v_state, i_state, v_checkpoints, i_checkpoints = states
        spikes, mem, out_ptr, out_idx, act_ptr, act_idx, act_x, counts = written
        N = v_state.shape[1]
        dtype = v_state.dtype
        padded = rows.shape[1]
        fill_rows(rows, params, bias, subtracts)
        in_x, in_rec, distance = np.int64(IN), np.int64(REC), rows[DISTANCE]
        x, rec, v, i, reset = rows[IN, :N], rows[REC, :N], rows[V, :N], rows[SYNAPTIC, :N], rows[RESET, :N]
        for j in range(padded):  # beyond column N nobody spikes
            distance[j] = -np.inf
        for j in range(N, padded):
            rows[OWN + THRESHOLD, j] = np.inf
        from_events = weight.shape[0] > 0
        keep_events = out_idx.shape[0] > 0
        keep_active = act_idx.shape[0] > 0
        keep_chunks = v_checkpoints.shape[0] > 0
        keep_spikes = spikes.shape[0] > 0
        keep_mem = mem.shape[0] > 0
        limit = dtype.type(window)
        one, zero = dtype.type(1), dtype.type(0)
        still = current.shape[0] == 1  # the same current at every step
        n, n_act, seen = counts[0], counts[1], counts[2]
        empty = values[:0]

        for b in range(first, last):
            if keep_events and n + T * N + LANES > out_idx.shape[0]:
                counts[0], counts[1], counts[2] = n, n_act, seen
                return b
            load2(v, v_state, b)
            if synapse:
                load2(i, i_state, b)
            previous = n  # where the spikes of the previous step begin
            for t in range(T):
                r = b * T + t
                if keep_chunks and t % CHUNK == 0:
                    store3(v_checkpoints, t // CHUNK, b, v)
                    if synapse:
                        store3(i_checkpoints, t // CHUNK, b, i)
                if from_events:
                    from_bias(padded, (rows, np.uint64(IN), rows))
                    add_rows(rows, in_x, weight, indices, values, indptr[r], indptr[r + 1])
                else:
                    load3(x, current, 0 if still else t, b)
                if recurrent:
                    if t == 0:
                        load2(rec, rec0, b)
                    else:
                        copy_row(rec, rec_bias)
                        add_rows(rows, in_rec, rec_weight, out_idx, empty, previous, n)
                    previous = n
                if plain:
                    step(padded, (rows, rows, np.uint64(IN), rows, np.uint64(DISTANCE)))
                else:
                    advance(params, x, rec, v, i, reset, distance)
                if keep_mem:
                    store3(mem, t, b, v)
                if not spiking:
                    continue
                if keep_spikes:
                    at, sample = np.uint64(t), np.uint64(b)
                    for j in range(N):
                        spikes[at, sample, j] = one if distance[j] > zero else zero
                if keep_events:
                    for k in range(0, padded, LANES):
                        n = append_columns(above16(distance, k), k, out_idx, n)
                    out_ptr[r + 1] = n
                if window >= 0:
                    room = keep_active and n_act + padded + LANES <= act_idx.shape[0]
                    for k in range(0, padded, LANES):
                        mask = within16(distance, k, limit)
                        seen += count_bits(mask)
                        if room:
                            pick(mask, distance, k, act_x, n_act)
                            n_act = append_columns(mask, k, act_idx, n_act)
                    if keep_active:
                        act_ptr[r + 1] = n_act
            store2(v_state, b, v)
            if synapse:
                store2(i_state, b, i)
        counts[0], counts[1], counts[2] = n, n_act, seen
        return last

    return forward
