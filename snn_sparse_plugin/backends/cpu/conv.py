"""Convolutions of spike events on a CPU, with a pool behind them.

For each event and tap a row of output channels is added to a map that stays in cache, so the work follows the events.
Weight gradients are exact; the input's is made at the active entries of the train alone, or by torch's product.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...core.convolution import Convolution
from ...core.spikes import SpikeTrain
from .conv_input import input_grad, is_sparse
from .conv_kernels import convolve, convolve_backward, unpool_rows
from .conv_tables import MAX_BYTE, Tables, rows_of_weight, tables, weight_of_rows
from .layout import added, aligned, array_or_empty, numpy_type
from .memory import array
from .pages import advise_huge_pages
from .threads import parallel, split

CHUNK_BYTES = 2**24
"""What the maps of a chunk of rows take, where torch's product needs them."""

DENSEST = 0.6
"""The share of spikes above which they take more room as events than as numbers."""

Arrays = tuple[np.ndarray, ...]


def prefers_events(conv: Convolution, density: float, masked: bool) -> bool:
    """Whether forward and backward take less time here than torch's convolution with this share of spikes.

    ``masked``: the input's gradient is wanted at its active entries alone, which are taken to be few.
    """
    found = tables(conv)
    width, channels, products = found.sizes[3], found.sizes[4], found.sizes[1] * len(found.order)
    rows = max(1.0, float(found.runs.length.mean()) / width) if len(found.runs.length) else 1.0
    # Fitted below the densities at which both took the same time (one thread of an AVX2 machine, processor time): 0.4
    # to 0.5 with 64 to 256 output channels, 0.15 to 0.3 with 8 to 32, 0.04 for depthwise; masked 1.3 to 1.6 times that,
    # and with a pool behind, which finds the map in cache here, 1.1 to 5 times, the more the fewer products a site has.
    # An event adds rows in whole vectors, a run costs as much as 32 more numbers, and what every site costs in any case
    # is worth 9 products, a pool of torch's 100.
    site = 100 - 9 if conv.pool is not None else -9
    limit = 0.4 * channels / (width + 32 / rows) * max(0.0, 1 + site / products)
    return density < min(DENSEST, 1.4 * limit if masked else limit)


def forward(
    conv: Convolution,
    train: SpikeTrain,
    weight: Tensor,
    bias: Tensor | None,
    keep_winners: bool,
    factors: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """-> current (T, B, out_features), and with ``keep_winners`` what :func:`backward` wants of a max-pool, else None.

    The current is bit-equal to torch's wherever sums are exact. ``factors``: scale and shift (C',) of what the
    convolution makes, before the pool.
    """
    T, B = train.shape[:2]
    found, dtype = tables(conv), numpy_type(weight.dtype)
    out = torch.empty(T, B, conv.out_features, dtype=weight.dtype)
    advise_huge_pages(out)
    is_max = conv.pool is not None and conv.pool.kind == "max"
    winners = torch.empty(T, B, _pooled_size(found), dtype=_place(found)) if is_max and keep_winners else None
    rows, biases = _weights(conv, weight), _by_channel(found, bias, dtype)
    scales = np.empty((2, 0), dtype)
    if factors is not None:
        scales = np.concatenate([_by_channel(found, x, dtype) for x in factors])
    events = _events(train, dtype)

    def run(first: int, last: int) -> None:
        convolve(
            *(
                (first, last, T, B),
                events,
                found.sizes,
                found.runs,
                found.windows,
                is_max,
                rows,
                biases,
                scales,
            ),
            *(array(out).reshape(1, -1), _rows(winners, found), *_scratch(found, dtype)),
        )

    if out.numel():
        parallel([lambda r=r: run(*r) for r in split(T * B)])  # type: ignore[misc]
    return out, winners


def backward(
    conv: Convolution,
    train: SpikeTrain,
    weight: Tensor,
    nu: Tensor,
    winners: Tensor | None,
    *,
    weight_grad: bool,
    bias_grad: bool,
    input: str,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of weight, bias and input from that of the current, ``nu`` (T, B, out_features).

    ``input``: ``"none"``, ``"active"``, a number for each of ``train.active`` in its order, or ``"dense"``, (T, B, M).
    Results depend on the number of threads, which add over ranges of rows, but not on timing.
    """
    T, B = train.shape[:2]
    if winners is None and conv.pool is not None and conv.pool.kind == "max":
        raise ValueError("the gradient of a max-pool needs its winners: run forward with keep_winners=True.")
    found, dtype = tables(conv), numpy_type(weight.dtype)
    arriving, places = array(nu).reshape(1, -1), _rows(winners, found)
    listed = train.active if input == "active" else None
    g_active = None if listed is None else torch.empty(listed.indices.numel(), dtype=weight.dtype)
    width, groups = found.sizes[3], found.sizes[5]
    none = np.empty(0, np.int32)
    active = (none, none) if listed is None else (array(listed.indptr), array(listed.indices))
    rows = np.empty((1, 0), dtype) if listed is None else _weights(conv, weight)
    events = _events(train, dtype)

    def run(first: int, last: int) -> Arrays:
        sums = (
            _zeros(_weight_size(conv, found) if weight_grad else 0, dtype),
            _zeros(groups * width * bias_grad, dtype),
        )
        convolve_backward(
            *((first, last, T, B), events, active, found.sizes, found.runs, found.windows),
            *(rows, arriving, places, *sums, array_or_empty(g_active, dtype, 1), *_scratch(found, dtype)),
        )
        return sums

    dense = None
    if input == "dense" and is_sparse(conv):
        dense = input_grad(conv, found, weight, arriving.reshape(T * B, conv.out_features), places).view(
            T, B, conv.in_features
        )
    elif input == "dense":
        dense = _dense(conv, found, weight, arriving, places, (T, B))
    if not (weight_grad or bias_grad or listed is not None):
        return None, None, dense
    parts = parallel([lambda r=r: run(*r) for r in split(T * B)])  # type: ignore[misc]
    g_weight, g_bias = (added(group) for group in zip(*parts, strict=True))
    return (
        torch.from_numpy(weight_of_rows(conv, g_weight)) if weight_grad else None,
        torch.from_numpy(_channels(g_bias, found).copy()) if bias_grad else None,
        g_active if dense is None else dense,
    )


def _dense(
    conv: Convolution,
    found: Tables,
    weight: Tensor,
    nu: np.ndarray,
    winners: np.ndarray,
    shape: tuple[int, int],
) -> Tensor:
    """The input's gradient everywhere, by torch's product, a few rows at a time."""
    width, channels, groups, sites = found.sizes[3:7]
    rows = shape[0] * shape[1]
    out = torch.empty(rows, conv.in_channels, *conv.size, dtype=weight.dtype)
    each = max(1, CHUNK_BYTES // (max(1, sites * groups * width) * weight.itemsize))
    maps = aligned(min(each, rows) if conv.pool else 0, sites * groups * width, nu.dtype)
    for first in range(0, rows, each):
        last = min(first + each, rows)
        g = torch.from_numpy(nu.reshape(rows, conv.out_features)[first:last])
        if conv.pool is not None:
            _unpool(found, nu, winners, maps, first, last)
            laid = torch.from_numpy(maps[: last - first]).view(-1, groups, sites, width)
            g = laid[..., :channels].transpose(2, 3).reshape(last - first, -1)
        maps_grad = g.view(-1, conv.out_channels, *conv.map_size)
        like = g.new_empty(1).expand(last - first, *out.shape[1:])
        options = (conv.stride, conv.padding, conv.dilation, False, [0] * len(conv.size), conv.groups)
        mask = [True, False, False]
        out[first:last] = torch.ops.aten.convolution_backward(maps_grad, like, weight, None, *options, mask)[
            0
        ]
    return out.view(*shape, conv.in_features)


def _unpool(
    found: Tables, nu: np.ndarray, winners: np.ndarray, maps: np.ndarray, first: int, last: int
) -> None:
    def run(begin: int, end: int) -> None:
        some = first + begin, first + end
        _, pooled = _scratch(found, nu.dtype)
        unpool_rows(*some, found.sizes, found.windows, nu, winners, maps[begin:end], pooled)

    parallel([lambda r=r: run(*r) for r in split(last - first)])  # type: ignore[misc]


# --- what kernels are given ---


def _events(train: SpikeTrain, dtype: np.dtype) -> Arrays:
    values = array_or_empty(train.values, dtype, 1).astype(dtype, copy=False)
    return array(train.indptr), array(train.indices), values


def _scratch(found: Tables, dtype: np.dtype) -> Arrays:
    """A map, and what a pool leaves of it, the map itself where there is none; zeros where a row has no channels."""
    maps = _zeros(found.sizes[5] * found.sizes[6] * found.sizes[3], dtype)
    return maps, _zeros(_pooled_size(found), dtype) if len(found.windows.first) else maps


def _pooled_size(found: Tables) -> int:
    return found.sizes[5] * found.sizes[7] * found.sizes[3]


def _place(found: Tables) -> torch.dtype:
    """What counts the places of a window."""
    first = found.windows.first
    return torch.uint8 if int(np.diff(first).max(initial=0)) <= MAX_BYTE else torch.int32


def _rows(winners: Tensor | None, found: Tables) -> np.ndarray:
    return np.empty((0, 0), np.uint8) if winners is None else array(winners).reshape(-1, _pooled_size(found))


def _weight_size(conv: Convolution, found: Tables) -> int:
    return conv.in_channels * found.sizes[2]


def _weights(conv: Convolution, weight: Tensor) -> np.ndarray:
    return rows_of_weight(
        conv, weight, aligned(1, _weight_size(conv, tables(conv)), numpy_type(weight.dtype))
    )


def _by_channel(found: Tables, x: Tensor | None, dtype: np.dtype) -> np.ndarray:
    """A number for each output channel as a row of the map has them, (1, groups · width)."""
    width, channels, groups = found.sizes[3:6]
    row = _zeros(groups * width, dtype)
    if x is not None:
        row.reshape(groups, width)[:, :channels] = array(x).reshape(groups, channels)
    return row


def _channels(row: np.ndarray, found: Tables) -> np.ndarray:
    width, channels, groups = found.sizes[3:6]
    return row.reshape(groups, width)[:, :channels].reshape(-1)


def _zeros(n: int, dtype: np.dtype) -> np.ndarray:
    out = aligned(1, n, dtype)
    out.fill(0)
    return out
