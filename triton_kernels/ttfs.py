"""Time-to-first-spike encode-decode: one pass forward, one pass backward with partial sums for the parameters."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..core.backend import TtfsBackward

BLOCK = 1024
SILENT = tl.constexpr(255)


@triton.jit(do_not_specialize=["n", "window"])
def ttfs_forward(x_ptr, table_ptr, out_ptr, times_ptr, n, window, BLOCK: tl.constexpr):
    """``table`` holds the thresholds of the window's steps, then their values."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    x = tl.load(x_ptr + at, mask=mask, other=0.0)
    # thresholds fall, so the first step reached is the number of those that are not; NaN reaches none
    t = tl.zeros([BLOCK], tl.int32)
    for k in range(window):
        t += tl.where(x >= tl.load(table_ptr + k), 0, 1)
    fires = t < window
    value = tl.load(table_ptr + window + t, mask=mask & fires, other=0.0)
    tl.store(out_ptr + at, tl.where(x == x, value, x), mask=mask)
    tl.store(times_ptr + at, tl.where(fires, t, SILENT).to(tl.uint8), mask=mask)


@triton.jit(do_not_specialize=["n", "window"])
def ttfs_backward(
    grad_ptr,
    x_ptr,
    times_ptr,
    table_ptr,
    tau_ptr,
    t_d_ptr,
    out_ptr,
    sums_ptr,
    n,
    window,
    RATE: tl.constexpr,
    PARAMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``sums`` (2, programs): late, over quantised elements, and the gradient that arrives at clipped ones."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    x = tl.load(x_ptr + at, mask=mask, other=0.0)
    grad = tl.load(grad_ptr + at, mask=mask, other=0.0)
    t = tl.load(times_ptr + at, mask=mask, other=SILENT).to(tl.int32)
    largest = tl.load(table_ptr + window)
    fires = t != SILENT
    inside = fires & (x <= largest)
    value = tl.load(table_ptr + window + t, mask=mask & fires, other=0.0)
    safe = tl.where(inside, x, largest)
    ratio = tl.where(inside, 1.0, 0.0) if RATE == 0 else tl.where(inside, value / safe, 0.0)
    tl.store(out_ptr + at, grad * tl.where(x == x, ratio.to(x.dtype), x), mask=mask)
    if PARAMS:
        tau = tl.load(tau_ptr)
        if RATE == 0:
            slope = tl.full([BLOCK], 1.0, x.dtype)
            exact = tl.load(t_d_ptr) - tau * (safe - 1.0)
        else:
            slope = value * RATE
            exact = tl.load(t_d_ptr) - tau * tl.log(safe) / RATE
        late = tl.where(inside, grad * slope * (t.to(x.dtype) - exact), 0.0)
        clipped = tl.where(fires & (x > largest), grad, 0.0)
        program, programs = tl.program_id(0), tl.num_programs(0)
        tl.store(sums_ptr + program, tl.sum(late))
        tl.store(sums_ptr + programs + program, tl.sum(clipped))


def forward(x: Tensor, table: Tensor, out: Tensor, times: Tensor) -> None:
    """Write xhat and the spike times; all dense, with the same strides."""
    n = x.numel()
    if n:
        with torch.cuda.device_of(x):
            ttfs_forward[(triton.cdiv(n, BLOCK),)](x, table, out, times, n, table.shape[1], BLOCK=BLOCK)


def backward(call: TtfsBackward) -> tuple[Tensor, Tensor]:
    """Write the gradient of x and return those of tau and t_d, zero without ``params``."""
    x, table, rate = call.x, call.table, call.rate
    n = x.numel()
    programs = triton.cdiv(n, BLOCK)
    sums = x.new_zeros(2, programs)
    tau, t_d = call.tau.to(x.dtype), call.t_d.to(x.dtype)
    if n:
        with torch.cuda.device_of(x):
            ttfs_backward[(programs,)](
                call.grad, x, call.times, table, tau, t_d, call.out, sums, n, table.shape[1],
                RATE=rate, PARAMS=call.params, BLOCK=BLOCK,
            )  # fmt: skip
    late, clipped = sums.sum(1)
    slope = torch.ones_like(tau) if rate == 0 else rate * table[1, 0]
    return late / tau**2 - slope * clipped * t_d / tau**2, slope * clipped / tau
