"""One layer of single spikes, event by event: each spike adds its row of weights to the membranes that it reaches."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

SILENT = 255


@triton.jit(do_not_specialize=["B", "n_out", "begin", "end"])
def dense_events(ptr_ptr, index_ptr, value_ptr, weight_ptr, u_ptr, B, n_out, begin, end, BLOCK: tl.constexpr):
    """A program adds one sample's spikes of the steps from ``begin`` to ``end``, in order, to a block of neurons."""
    sample = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < n_out
    u = tl.load(u_ptr + sample * n_out + cols, mask=mask, other=0.0)
    for step in range(begin, end):
        spikes = ptr_ptr + step * B + sample
        for e in range(tl.load(spikes), tl.load(spikes + 1)):
            row = tl.load(index_ptr + e).to(tl.int64)
            u += tl.load(weight_ptr + row * n_out + cols, mask=mask, other=0.0) * tl.load(value_ptr + e)
    tl.store(u_ptr + sample * n_out + cols, u, mask=mask)


@triton.jit(do_not_specialize=["W", "C", "OH", "OW", "OC", "group_in", "group_out"])
def conv_events(
    sample_ptr,
    index_ptr,
    value_ptr,
    weight_ptr,
    u_ptr,
    W,
    C,
    OH,
    OW,
    OC,
    group_in,
    group_out,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    TH: tl.constexpr,
    TW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program adds one spike through one tap of the kernel; spikes that meet in a neuron add atomically."""
    event = tl.program_id(0).to(tl.int64)
    tap = tl.program_id(1)
    ky, kx = tap // KW, tap % KW
    index = tl.load(index_ptr + event)
    c, x, y = index % C, index // C % W, index // C // W
    oy, ox = y + TH - ky * DH, x + TW - kx * DW
    inside = (oy >= 0) & (ox >= 0) & (oy % SH == 0) & (ox % SW == 0) & (oy // SH < OH) & (ox // SW < OW)
    if inside:
        cols = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
        row = ((c * KH + ky) * KW + kx).to(tl.int64)
        weight = tl.load(weight_ptr + row * group_out + cols, mask=cols < group_out, other=0.0)
        position = (tl.load(sample_ptr + event) * OH + oy // SH) * OW + ox // SW
        to = position * OC + c // group_in * group_out + cols
        tl.atomic_add(u_ptr + to, weight * tl.load(value_ptr + event), mask=cols < group_out)


class Events(NamedTuple):
    """Spikes by step, sample and neuron: sample and pooled neuron of each, and what it is worth.

    ``ptr[step * B + sample]`` is where those of a sample's step begin, ``bounds[step]`` where those of a step do.
    """

    sample: Tensor
    index: Tensor
    value: Tensor
    ptr: Tensor
    bounds: list[int]


def arriving(times: Tensor, values: Tensor, sizes: tuple[int, ...]) -> Events:
    """The events of spike times (B, inputs); ``sizes`` as the CPU kernels take them, ``values`` by step."""
    H, W, C, _, _, _, PH, PW = sizes
    B, steps = len(times), len(values)
    sample, index = (times != SILENT).nonzero(as_tuple=True)
    step = times[sample, index].long()
    if PH * PW > 1:  # a spike moves to its cell and is worth a share; an incomplete border is left out
        channel, x, y = index % C, index // C % W // PW, index // C // W // PH
        inside = (y < H // PH) & (x < W // PW)
        index = ((y * (W // PW) + x) * C + channel)[inside]
        sample, step, values = sample[inside], step[inside], values / (PH * PW)
    row = step * B + sample
    order = torch.argsort(row, stable=True)
    ptr = torch.zeros(steps * B + 1, dtype=torch.int64, device=times.device)
    ptr[1:] = torch.bincount(row, minlength=steps * B).cumsum(0)
    bounds = [0, *torch.bincount(step, minlength=steps).cumsum(0).tolist()]
    return Events(sample[order], index[order].int(), values[step[order]], ptr, bounds)


def add(
    events: Events,
    u: Tensor,
    weight: Tensor,
    sizes: tuple[int, ...],
    taps: tuple[int, ...],
    dense: bool,
    steps: range,
) -> None:
    """Add the events of some steps to membranes (B, neurons); weights, sizes and taps as the CPU kernels take them."""
    _, W, C, OH, OW, OC, _, PW = sizes
    B = len(u)
    begin, end = events.bounds[steps.start], events.bounds[steps.stop]
    if begin == end:
        return
    with torch.cuda.device_of(u):
        if dense:
            block = min(256, triton.next_power_of_2(OC))
            dense_events[(B, triton.cdiv(OC, block))](
                events.ptr, events.index, events.value, weight, u, B, OC, steps.start, steps.stop,
                BLOCK=block, enable_fp_fusion=False,
            )  # fmt: skip
            return
        KH, KW, *_, groups = taps
        group_out = OC // groups
        block = min(128, triton.next_power_of_2(group_out))
        conv_events[(end - begin, KH * KW, triton.cdiv(group_out, block))](
            events.sample[begin:end], events.index[begin:end], events.value[begin:end], weight, u,
            W // PW, C, OH, OW, OC, C // groups, group_out, *taps[:8], BLOCK=block, enable_fp_fusion=False,
        )  # fmt: skip


def operations(events: Events, B: int, sizes: tuple[int, ...], taps: tuple[int, ...], dense: bool) -> Tensor:
    """Weights that the events of each sample add, (B,) int64."""
    H, W, C, OH, OW, OC, PH, PW = sizes
    KH, KW, SH, SW, TH, TW, DH, DW, groups = taps
    if dense:
        return torch.bincount(events.sample, minlength=B) * OC
    position, device = (events.index // C).long(), events.index.device
    rows = _reached(H // PH, OH, KH, SH, TH, DH).to(device)[position // (W // PW)]
    columns = _reached(W // PW, OW, KW, SW, TW, DW).to(device)[position % (W // PW)]
    added = torch.zeros(B, dtype=torch.int64, device=device)
    return added.index_add_(0, events.sample, rows * columns * (OC // groups))


def _reached(size: int, out: int, kernel: int, stride: int, padding: int, dilation: int) -> Tensor:
    """How many outputs along one axis each input position reaches."""
    to = torch.arange(size)[:, None] + padding - torch.arange(kernel)[None, :] * dilation
    return ((to >= 0) & (to % stride == 0) & (to // stride < out)).sum(1)
