"""One layer of single spikes, event by event: each spike adds its row of weights to the membranes that it reaches."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SILENT = 255


@triton.jit(do_not_specialize=["n_out"])
def dense_events(ptr_ptr, index_ptr, value_ptr, weight_ptr, start_ptr, u_ptr, n_out, BLOCK: tl.constexpr):
    """A program sums one sample's spikes, in the order of their times, for a block of neurons."""
    sample = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < n_out
    u = tl.load(start_ptr + cols, mask=mask, other=0.0)
    for e in range(tl.load(ptr_ptr + sample), tl.load(ptr_ptr + sample + 1)):
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


def membranes(
    times: Tensor,
    values: Tensor,
    weight: Tensor,
    start: Tensor,
    sizes: tuple[int, ...],
    taps: tuple[int, ...],
    dense: bool,
) -> tuple[Tensor, Tensor]:
    """Membranes (B, neurons) after all spikes, and weights added (B,); arguments as the CPU kernels take them.

    Average pooling must be done before: ``sizes`` says 1×1.
    """
    H, W, C, OH, OW, OC, _, _ = sizes
    KH, KW, SH, SW, TH, TW, DH, DW, groups = taps
    fired = times != SILENT
    sample, index = fired.nonzero(as_tuple=True)
    step = times[sample, index]
    order = torch.argsort(sample * 256 + step, stable=True)
    sample, index, value = sample[order], index[order].int(), values[step[order].long()]
    B, group_out = times.shape[0], OC // groups
    if dense:
        u = weight.new_empty(B, OC)
        ptr = torch.zeros(B + 1, dtype=torch.int64, device=times.device)
        ptr[1:] = fired.sum(1).cumsum(0)
        block = min(256, triton.next_power_of_2(OC))
        if B:
            with torch.cuda.device_of(u):
                dense_events[(B, triton.cdiv(OC, block))](
                    ptr, index, value, weight, start, u, OC, BLOCK=block, enable_fp_fusion=False
                )
        return u, fired.sum(1) * OC
    u = start.repeat(B, 1)
    if len(index):
        block = min(128, triton.next_power_of_2(group_out))
        grid = (len(index), KH * KW, triton.cdiv(group_out, block))
        with torch.cuda.device_of(u):
            conv_events[grid](
                sample, index, value, weight, u, W, C, OH, OW, OC, C // groups, group_out,
                *taps[:8], BLOCK=block, enable_fp_fusion=False,
            )  # fmt: skip
    rows = _reached(H, OH, KH, SH, TH, DH).to(times.device)[(index // C // W).long()]
    columns = _reached(W, OW, KW, SW, TW, DW).to(times.device)[(index // C % W).long()]
    added = torch.zeros(B, dtype=torch.int64, device=times.device)
    return u, added.index_add_(0, sample, rows * columns * group_out)


def _reached(size: int, out: int, kernel: int, stride: int, padding: int, dilation: int) -> Tensor:
    """How many outputs along one axis each input position reaches."""
    to = torch.arange(size)[:, None] + padding - torch.arange(kernel)[None, :] * dilation
    return ((to >= 0) & (to % stride == 0) & (to // stride < out)).sum(1)
