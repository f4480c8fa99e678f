"""What comes to the neurons of a call, and weights as kernels read them: turned over, so that an event adds a row."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn

from ...core.backend import LayerCall
from ...core.unseen import moment_of
from .arguments import Fed
from .layout import INT32, aligned, array_or_empty, empty, finite, padded
from .memory import array
from .turned import turn

ROWS = "_snn_rows"
"""Attribute of a weight's storage: the rows that were made of it."""

KEEP_BELOW = 1 << 20
"""Bytes of a weight, or of its rows, up to which the rows are kept: with it, or for a backward that reads them. To make
them again takes a good part of a small batch's time; of larger weights they would take more memory than that is worth.
"""


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


class _Kept(NamedTuple):
    """Rows of a parameter, and what tells whether its numbers are still those that they were made of."""

    form: Any
    sample: bytes | None = None  # None: the form was noted, and no rows were kept
    rows: np.ndarray | None = None


_NEVER = _Kept(None)


def transposed(weight: Tensor | None, dtype: np.dtype) -> np.ndarray:
    """Rows of W^T in whole vectors, to be read.

    They are kept for as long as a parameter is what it was: for batches that are only evaluated, chunks of a stream,
    and gradients that add up over batches. To compare all numbers would take as long as to turn them over.
    """
    if weight is None:
        return empty(dtype, 2)
    numbers = array(weight)
    # other weights are made at each call, in memory that another may have been in
    moment = moment_of(weight) if type(weight) is nn.Parameter and numbers.nbytes <= KEEP_BELOW else None
    if moment is None:
        return _turned(numbers, dtype)
    form = moment, weight.storage_offset(), weight.shape, weight.stride(), dtype
    before = _kept(weight)
    if before.form == form and before.sample == _sample(numbers):
        return before.rows  # type: ignore[return-value]
    rows = _turned(numbers, dtype)
    # only noted at first: an optimizer that steps after each batch has nothing kept
    keeps = before.form == form and finite(rows)
    weight.untyped_storage().__dict__[ROWS] = _Kept(form, _sample(numbers), rows) if keeps else _Kept(form)
    return rows


def _kept(weight: Tensor) -> _Kept:
    return weight.untyped_storage().__dict__.get(ROWS, _NEVER)  # type: ignore[no-any-return]


def _sample(numbers: np.ndarray) -> bytes:
    """A number of each row, in another column each: whoever writes to a weight without a version, such as a collective,
    writes to all of it."""
    return numbers.reshape(-1)[:: numbers.shape[1] + 1].tobytes()


def are_finite(weight: Tensor | None, rows: np.ndarray) -> bool:
    """Whether no number of the rows of a weight is NaN or infinite, which those that are kept never are."""
    return (weight is not None and rows is _kept(weight).rows) or finite(rows)


def _turned(numbers: np.ndarray, dtype: np.dtype) -> np.ndarray:
    n, m = numbers.shape
    return flip(numbers, aligned(m, padded(n), dtype))


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
