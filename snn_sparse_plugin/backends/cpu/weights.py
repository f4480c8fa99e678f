"""What comes to the neurons of a call, and weights as kernels read them: turned over, so that an event adds a row."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from torch import Tensor

from ...core.backend import LayerCall
from ...core.unseen import moment_of
from .arguments import Fed
from .layout import INT32, aligned, array_or_empty, empty, finite, padded
from .memory import array
from .turned import turn

ROWS = "_snn_rows"
"""Attribute of a weight's storage: the rows that were made of it."""

KEEP_BELOW = 1 << 20
"""Bytes of rows that are kept, with a weight or for a backward that reads them: to make them again takes longer than
the steps of a small batch."""


def inputs_of(call: LayerCall, dtype: np.dtype, weight: bool = True) -> Fed:
    """What comes to the neurons of a call; without ``weight`` for a kernel that never looks at the weights."""
    current = call.current
    if current is not None:
        still = call.T > 1 and current.stride(0) == 0
        current = (current[:1] if still else current).contiguous()
    indptr = indices = empty(INT32, 1)
    values = empty(dtype, 1)
    if call.train is not None:
        indptr, indices = array(call.train.indptr), array(call.train.indices)
        values = array_or_empty(call.train.values, dtype, 1)
    zeros = no_bias(call.currents, dtype)
    made = call.rows if weight else None  # a backward has those that the forward made
    return Fed(
        array_or_empty(current, dtype, 3),
        indptr,
        indices,
        values,
        transposed(call.weight if weight else None, dtype) if made is None else array(made),
        zeros if call.bias is None else array(call.bias),
        transposed(call.rec_weight, dtype),
        zeros if call.rec_bias is None else array(call.rec_bias),
        array_or_empty(call.rec0, dtype, 2),
    )


@lru_cache(maxsize=256)
def no_bias(n: int, dtype: np.dtype) -> np.ndarray:
    """Zeros that kernels only read."""
    return np.zeros(n, dtype)


def transposed(weight: Tensor | None, dtype: np.dtype) -> np.ndarray:
    """Rows of W^T in whole vectors, to be read.

    They are kept for as long as the weight is what it was: for batches that are only evaluated, chunks of a stream, and
    gradients that add up over batches.
    """
    if weight is None:
        return empty(dtype, 2)
    moment = moment_of(weight)
    if moment is None:
        return _turned(weight, dtype)
    form = moment, weight.storage_offset(), weight.shape, weight.stride(), dtype
    before, rows = _kept(weight)
    if before == form and rows is not None:
        return rows
    rows = _turned(weight, dtype)
    # only noted at first: an optimizer that steps after each batch has nothing kept
    keeps = before == form and rows.nbytes <= KEEP_BELOW and finite(rows)
    weight.untyped_storage().__dict__[ROWS] = form, rows if keeps else None
    return rows


def _kept(weight: Tensor) -> tuple[Any, np.ndarray | None]:
    """What a weight was when rows were made of it, and these if they were kept."""
    return weight.untyped_storage().__dict__.get(ROWS, (None, None))  # type: ignore[no-any-return]


def are_finite(weight: Tensor | None, rows: np.ndarray) -> bool:
    """Whether no number of the rows of a weight is NaN or infinite, which those that are kept never are."""
    return (weight is not None and rows is _kept(weight)[1]) or finite(rows)


def _turned(weight: Tensor, dtype: np.dtype) -> np.ndarray:
    n, m = weight.shape
    return flip(array(weight), aligned(m, padded(n), dtype))


def rows_of(weight: Tensor | None, dtype: np.dtype) -> np.ndarray:
    """Rows of W in whole vectors."""
    if weight is None:
        return empty(dtype, 2)
    n, m = weight.shape
    out = aligned(n, padded(m), dtype)
    out[:, :m], out[:, m:] = array(weight), 0
    return out


def flip(x: np.ndarray, out: np.ndarray, more: np.ndarray | None = None) -> np.ndarray:
    """``out = x.T``, or ``(x + more).T``; zeros where rows are padded. A weight is too small to be worth waking a
    thread."""
    turn(x, empty(x.dtype, 2) if more is None else more, out)
    return out
