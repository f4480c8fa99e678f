"""Time-to-first-spike encode-decode on CPU: one pass forward, one pass backward.

The step is found through the leading bits of x: they index a bucket with the latest step that any x in it can fire
at, and comparisons with the thresholds inside the bucket finish. So a step is always decided by comparison with the
table, at a cost that does not grow with the window.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...core.backend import TtfsBackward
from .jit import kernel
from .memory import array
from .pages import advise_huge_pages
from .threads import parallel, split

_SMALL = 1 << 15  # elements that a second thread is not worth
_BLOCK = 1024  # elements summed in x's dtype before they join a double
SHIFT = {"float32": 16, "float64": 45}  # leaves sign, exponent and seven bits of mantissa
_INTEGER = {"float32": np.int32, "float64": np.int64}
SILENT = 255


def buckets(thresholds: np.ndarray, shift: int) -> tuple[np.ndarray, int, int]:
    """The latest step of each bucket, the number of the first bucket, and the most thresholds inside one."""
    integer = _INTEGER[thresholds.dtype.name]
    keys = thresholds.view(integer) >> shift
    first = int(keys.min()) - 1  # all that is smaller joins a bucket in which nothing fires
    edges = (np.arange(first, int(keys.max()) + 2, dtype=np.int64) << shift).astype(integer)
    steps = np.searchsorted(-thresholds, -edges.view(thresholds.dtype), side="left").astype(np.uint32)
    return steps, first, int((steps[:-1].astype(np.int64) - steps[1:]).max(initial=1))


@kernel(error_model="numpy")
def _forward(x, bits, begin, end, first, shift, steps, above, values, codes, compares, out, times):  # type: ignore[no-untyped-def]
    """``above[t]`` is the threshold of step t - 1; ``values[t]`` and ``codes[t]`` are what a spike at t is written as.

    Branches on the data would be mispredicted half of the time, so there is none, and NaN is looked for by block.
    """
    last = np.int32(steps.shape[0] - 1)
    zero = np.int32(0)
    for start in range(begin, end, _BLOCK):
        stop = min(start + _BLOCK, end)
        nan = 0
        for k in range(np.uint64(start), np.uint64(stop)):
            bucket = min(max(np.int32(bits[k] >> shift) - first, zero), last)
            t = steps[np.uint32(bucket)]
            for _ in range(compares):
                t = np.uint32(t - np.uint32(x[k] >= above[t]))
            out[k] = values[t]
            times[k] = codes[t]
            nan += x[k] != x[k]
        if nan:
            for k in range(start, stop):
                if x[k] != x[k]:
                    out[k] = x[k]
                    times[k] = SILENT


@kernel(error_model="numpy")
def _backward_x(grad, x, times, begin, end, values, largest, linear, out):  # type: ignore[no-untyped-def]
    zero = largest - largest
    one = largest / largest
    for k in range(begin, end):
        inside = (times[k] != SILENT) & (x[k] <= largest)
        ratio = one if linear else values[times[k]] / x[k]
        factor = ratio if inside else zero
        out[k] = grad[k] * (x[k] if x[k] != x[k] else factor)


_ODD = tuple(np.float32(1 / n) for n in (1, 3, 5, 7, 9))


@kernel(error_model="numpy", fastmath={"reassoc", "nsz", "contract"})
def _backward_all(grad, x, times, begin, end, values, largest, out, sums):  # type: ignore[no-untyped-def]
    """As above for an exponential kernel in float32, and the sums that d tau and d t_d are made of.

    ``ln(x / value)`` is 2 artanh(z), z = (x - value) / (x + value): five terms are float32's precision for |z| < 1/4.
    """
    zero = largest - largest
    c1, c3, c5, c7, c9 = _ODD
    late, clipped = 0.0, 0.0
    for start in range(begin, end, _BLOCK):
        block_late, block_clipped = zero, zero
        stop = min(start + _BLOCK, end)
        for k in range(start, stop):
            inside = (times[k] != SILENT) & (x[k] <= largest)
            ratio = values[times[k]] / x[k]
            factor = ratio if inside else zero
            out[k] = grad[k] * (x[k] if x[k] != x[k] else factor)
        # a loop of its own: one that also stores is not vectorised
        for k in range(start, stop):
            value = values[times[k]]
            z = (x[k] - value) / (x[k] + value)
            z2 = z * z
            log = z * (c1 + z2 * (c3 + z2 * (c5 + z2 * (c7 + z2 * c9))))
            block_late += grad[k] * value * log if (times[k] != SILENT) & (x[k] <= largest) else zero
            block_clipped += grad[k] if x[k] > largest else zero
        late += block_late
        clipped += block_clipped
    sums[0] = 2 * late
    sums[1] = clipped


@kernel(error_model="numpy")
def _backward_exact(grad, x, times, begin, end, values, largest, linear, tau, t_d, rate, out, sums):  # type: ignore[no-untyped-def]
    """Any kernel and precision: the exact firing time by the logarithm. Sums as above, times tau / rate."""
    late, clipped = 0.0, 0.0
    for k in range(begin, end):
        if x[k] != x[k]:
            out[k] = x[k]
        elif times[k] == SILENT:
            out[k] = 0 * grad[k]
        elif x[k] > largest:
            out[k] = 0 * grad[k]
            clipped += grad[k]
        else:
            value = values[times[k]]
            if linear:
                out[k] = grad[k]
                late += grad[k] * (times[k] - t_d + tau * (x[k] - 1.0))
            else:
                out[k] = grad[k] * (value / x[k])
                late += grad[k] * value * (times[k] - t_d + tau * np.log(np.float64(x[k])) / rate)
    sums[0] = late
    sums[1] = clipped


def _flat(x: Tensor) -> np.ndarray:
    """The storage of a dense tensor, in memory order."""
    return array(x.detach().as_strided((x.numel(),), (1,)))


def _ranges(n: int) -> list[tuple[int, int]]:
    return split(n, None if n >= _SMALL else 1)


def forward(x: Tensor, table: Tensor, out: Tensor, times: Tensor) -> None:
    """Write xhat and the spike times; all three tensors are dense with the same strides."""
    if not x.numel():
        return
    advise_huge_pages(out)
    advise_huge_pages(times)
    rows = array(table)
    shift, window = SHIFT[rows.dtype.name], rows.shape[1]
    steps, first, compares = buckets(np.ascontiguousarray(rows[0]), shift)
    above = np.concatenate([[np.nan], rows[0]]).astype(rows.dtype)  # no step before 0, not even at infinity
    values = np.concatenate([rows[1], [0.0]]).astype(rows.dtype)
    flat = _flat(x)
    codes = np.append(np.arange(window), SILENT).astype(np.uint8)
    arguments = (
        np.int32(first),
        np.int32(shift),
        steps,
        above,
        values,
        codes,
        compares,
        _flat(out),
        _flat(times),
    )
    bits = flat.view(_INTEGER[rows.dtype.name])
    parallel([partial(_forward, flat, bits, *r, *arguments) for r in _ranges(flat.size)])


def backward(call: TtfsBackward) -> tuple[float, float]:
    """Write the gradient of x and return those of tau and t_d (0 without ``params``)."""
    grad, x, times, table, out, tau_, t_d_, rate, params = call
    tau, t_d = float(tau_), float(t_d_)
    if not x.numel():
        return 0.0, 0.0
    advise_huge_pages(out)
    rows = array(table)
    values = np.zeros(256, rows.dtype)
    values[: rows.shape[1]] = rows[1]
    largest, linear = values[0], rate == 0
    arrays = _flat(grad), _flat(x), _flat(times)
    ranges = _ranges(x.numel())
    if not params:
        parallel([partial(_backward_x, *arrays, *r, values, largest, linear, _flat(out)) for r in ranges])
        return 0.0, 0.0
    sums = np.zeros((len(ranges), 2))
    # neighbours of one table, and x between two thresholds, differ by less than this factor
    close = not linear and x.dtype == torch.float32 and 1.25 * np.exp(-rate / tau) > 1
    tasks: list[Any] = []
    for k, r in enumerate(ranges):
        if close:
            tasks.append(partial(_backward_all, *arrays, *r, values, largest, _flat(out), sums[k]))
        else:
            more = (linear, tau, t_d, rate, _flat(out), sums[k])
            tasks.append(partial(_backward_exact, *arrays, *r, values, largest, *more))
    parallel(tasks)
    late, clipped = sums.sum(0)
    if close:
        late *= tau / rate
    slope, slope_of_value = (1.0, 1.0) if linear else (rate * float(largest), rate)
    d_tau = slope_of_value * late / tau**2 - slope * clipped * t_d / tau**2
    return float(d_tau), float(slope * clipped / tau)
