"""One layer of single spikes, event by event: each spike adds its row of weights, nothing else is computed.

Inside, a layer's neurons are ordered (row, column, channel), so that what one spike reaches at one position lies in
one row of memory.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import numpy as np

from .jit import kernel
from .threads import parallel, split
from .ttfs import SHIFT, SILENT, buckets


@kernel()
def _in_order(times, order, counts):  # type: ignore[no-untyped-def]
    """Sort the spikes of one sample by step, then by neuron; ``counts[k + 1]`` is where those of step k end."""
    counts[:] = 0
    for n in range(times.shape[0]):
        if times[n] != SILENT:
            counts[np.uint32(times[n]) + np.uint32(2)] += 1
    for k in range(2, counts.shape[0]):
        counts[k] += counts[k - 1]
    for n in range(times.shape[0]):
        if times[n] != SILENT:
            slot = np.uint32(times[n]) + np.uint32(1)
            order[counts[slot]] = n
            counts[slot] += 1


@kernel()
def _fire(u, bits, first, shift, steps, above, out):  # type: ignore[no-untyped-def]
    """All inputs are in, so the whole falling threshold is one look-up per neuron. Returns the number of spikes."""
    last, zero = np.int32(steps.shape[0] - 1), np.int32(0)
    silent = steps[0]
    spikes = 0
    for n in range(u.shape[0]):
        bucket = min(max(np.int32(bits[n] >> shift) - first, zero), last)
        t = steps[np.uint32(bucket)]
        while u[n] >= above[t]:
            t = np.uint32(t - np.uint32(1))
        out[n] = SILENT if t == silent else t
        spikes += t != silent
    return spikes


@kernel()
def _fire_step(u, threshold, step, out):  # type: ignore[no-untyped-def]
    """One step of the falling threshold, for layers that fire while spikes still arrive."""
    spikes = 0
    for n in range(u.shape[0]):
        if out[n] == SILENT and u[n] >= threshold:
            out[n] = step
            spikes += 1
    return spikes


def _layer_kernel(dense: bool) -> Any:
    """The kernel of a dense layer or of a convolution.

    ``weight`` has a row for each input (dense), or for each input channel and tap. ``sizes``: rows, columns, channels
    in; rows, columns, channels out; rows and columns of the average pooling. ``taps``: kernel, stride, padding and
    dilation, rows and columns each, and groups.
    """

    @kernel(allocates=True)
    def layer(
        times,
        values,
        begin,
        end,
        weight,
        start,
        sizes,
        taps,
        first_fire,
        table,
        finder,
        u,
        bits,
        out,
        spikes,
        synops,
    ):  # type: ignore[no-untyped-def]
        H, W, C, OH, OW, OC, PH, PW = sizes
        KH, KW, SH, SW, TH, TW, DH, DW, groups = taps
        first, shift, steps, above = finder
        IH, IW, group_in, group_out = H // PH, W // PW, C // groups, OC // groups
        window, arriving = table.shape[0], values.shape[0]
        early = window > 0 and first_fire < arriving
        order, counts = np.empty(times.shape[1], np.int32), np.empty(258, np.int32)
        for b in range(begin, end):
            mem = u[b]
            mem[:] = start
            _in_order(times[b], order, counts)
            done, reached, fired = 0, 0, 0
            if early:
                out[b, :] = SILENT
            for k in range(max(arriving, first_fire + window) if early else arriving):
                if k < arriving:
                    value = values[k]
                    for e in range(done, counts[k + 1]):
                        index = np.int64(order[e])
                        c, y, x = index % C, index // C // W // PH, index // C % W // PW
                        if y >= IH or x >= IW:
                            continue  # average pooling leaves out an incomplete border
                        if dense:
                            row = (y * IW + x) * C + c
                            for o in range(np.uint64(OC)):
                                mem[o] += weight[row, o] * value
                            reached += OC
                            continue
                        to_group = c // group_in * group_out
                        for ky in range(KH):
                            oy = y + TH - ky * DH
                            if oy < 0 or oy % SH != 0 or oy // SH >= OH:
                                continue
                            for kx in range(KW):
                                ox = x + TW - kx * DW
                                if ox < 0 or ox % SW != 0 or ox // SW >= OW:
                                    continue
                                row = (c * KH + ky) * KW + kx
                                to = np.uint64((oy // SH * OW + ox // SW) * OC + to_group)
                                for o in range(np.uint64(group_out)):
                                    mem[to + o] += weight[row, o] * value
                                reached += group_out
                    done = counts[k + 1]
                j = k - first_fire
                if early and 0 <= j < window:
                    fired += _fire_step(mem, table[j], j, out[b])
            if window > 0 and not early:
                fired = _fire(mem, bits[b], first, shift, steps, above, out[b])
            spikes[b] = fired
            synops[b] = reached

    return layer


_dense, _conv = _layer_kernel(True), _layer_kernel(False)


class Synapses(NamedTuple):
    """A layer as the kernels read it; neurons ordered (row, column, channel)."""

    weight: np.ndarray
    start: np.ndarray  # membrane before any spike
    sizes: tuple[int, ...]
    taps: tuple[int, ...]
    dense: bool


class Fired(NamedTuple):
    """Membranes and spike times (B, neurons) in the kernels' order, spikes and synaptic operations (B,)."""

    u: np.ndarray
    times: np.ndarray
    spikes: np.ndarray
    synops: np.ndarray


def run_layer(
    times: np.ndarray, values: np.ndarray, layer: Synapses, thresholds: np.ndarray, first_fire: int
) -> Fired:
    """Spike times (B, inputs) through one layer; ``thresholds`` is empty for a readout, ``values`` what a spike of
    each step is worth."""
    B, dtype = times.shape[0], layer.weight.dtype
    found = Fired(
        np.empty((B, layer.start.size), dtype),
        np.empty((B, layer.start.size), np.uint8),
        np.empty(B, np.int64),
        np.empty(B, np.int64),
    )
    shift = SHIFT[dtype.name]
    values = values / dtype.type(layer.sizes[6] * layer.sizes[7])  # average pooling
    steps, first, _ = buckets(thresholds if thresholds.size else np.ones(1, dtype), shift)
    above = np.concatenate([[np.nan], thresholds]).astype(dtype)
    finder = (np.int32(first), np.int32(shift), steps, above)
    bits = found.u.view(np.int32 if dtype == np.float32 else np.int64)
    rest = (layer.weight, layer.start, layer.sizes, layer.taps, first_fire, thresholds, finder, found.u, bits)
    run = _dense if layer.dense else _conv
    parallel([partial(run, times, values, *r, *rest, *found[1:]) for r in split(B)])
    return found
