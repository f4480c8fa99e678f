"""A call's tensors as kernels take them: numpy arrays, empty where something is absent, rows in whole vectors.

All of it is numpy and numba on purpose: torch would use its OpenMP threads, which then spin for ms on the cores that
our threads need (measured: up to twice the time of a step on two cores).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from itertools import repeat

import numpy as np
import torch
from torch import Tensor

from ...core.backend import LayerCall
from .bits import LANES
from .memory import array
from .threads import WAKING, split
from .turned import all_finite

# Seconds that the forward takes for a row, the neurons of a sample at one step, and besides for each neuron; about.
ROW, EACH = 5e-8, 9e-10
# What takes one thread less is not shared out: to wake another, and what it asks for, takes as long.
SHORTEST = 2 * WAKING

_SINGLE, DOUBLE, INT32 = np.dtype("float32"), np.dtype("float64"), np.dtype("int32")


def numpy_type(dtype: torch.dtype) -> np.dtype:
    return _SINGLE if dtype == torch.float32 else DOUBLE


def array_or_empty(x: Tensor | None, dtype: np.dtype, dim: int) -> np.ndarray:
    return empty(dtype, dim) if x is None else array(x)


@cache
def empty(dtype: np.dtype, dim: int) -> np.ndarray:
    """What kernels take for something that is absent."""
    return np.empty((0,) * dim, dtype)


def ranges_of(calls: Sequence[LayerCall], costs: Sequence[float] = ()) -> list[tuple[int, int]]:
    """The samples of calls that follow each other in ranges, one for each thread; one range where that is faster.

    ``costs``: times that their kernels take, by those of forwards.
    """
    sample = 0.0  # seconds
    for call, cost in zip(calls, costs or repeat(1.0)):  # noqa: B905, as ones have no end
        sample += cost * call.T * (ROW + EACH * call.N)
    B = calls[0].B
    return _shared_out(B, sample, torch.get_num_threads()) if sample * B > SHORTEST else [(0, B)]


@lru_cache(maxsize=256)
def _shared_out(B: int, sample: float, threads: int) -> list[tuple[int, int]]:
    return split(B, threads, round(WAKING / sample))


TOGETHER = 1 << 22
"""Neuron-steps and weights of layers that run together: with more, what they hold at once is more than a hand-over is
worth."""


def are_small(calls: Sequence[LayerCall]) -> bool:
    """Whether these layers may run together."""
    size = 0
    for call in calls:
        size += call.T * call.B * call.N + (0 if call.weight is None else call.weight.numel())
    return size <= TOGETHER


def padded(n: int) -> int:
    """The length of a row of ``n`` neurons in whole vectors, so that no loop over it has a remainder."""
    return -(-n // LANES) * LANES


def aligned(
    rows: int, columns: int, dtype: np.dtype, new: Callable[..., np.ndarray] = np.empty
) -> np.ndarray:
    """New memory that begins at a cache line: vectors that lie across two lines take twice the time."""
    size, line = rows * columns, _LINE // dtype.itemsize
    room = new(size + line, dtype)
    first = -ctypes.addressof(ctypes.c_char.from_buffer(room)) % _LINE  # type: ignore[arg-type]
    return np.ndarray((rows, columns), dtype, room, first)


_LINE = 64  # bytes


def zero_rows(rows: int, n: int, dtype: np.dtype) -> np.ndarray:
    """Rows of ``n`` zeros in whole vectors."""
    return aligned(rows, padded(n), dtype, np.zeros)


def finite(*arrays: np.ndarray) -> bool:
    """Whether no number of contiguous arrays is NaN or infinite."""
    for x in arrays:  # noqa: SIM110, which takes a third longer
        if x.size and not all_finite(x.reshape(-1)):
            return False
    return True


def copied(x: Tensor | None, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """A copy of ``x`` that a kernel may change, or zeros."""
    return np.zeros(shape, dtype) if x is None else array(x).copy()


def joined(parts: list[np.ndarray]) -> np.ndarray:
    """What ranges of samples left, one after the other, in memory of its own."""
    return parts[0].copy() if len(parts) == 1 else np.concatenate(parts)


def added(parts: tuple[np.ndarray, ...]) -> np.ndarray:
    """The sum over ranges of samples, in order and in place of the first."""
    total = parts[0]
    for part in parts[1:]:
        total += part
    return total
