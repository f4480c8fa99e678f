"""Sums of rows write to their own row alone, whatever its width."""

from __future__ import annotations

import numpy as np
import pytest
from numba import njit

from snn_sparse_plugin.backends.cpu.eprop_chunk import _add_rows
from snn_sparse_plugin.backends.cpu.rows import add_rows


@njit
def whole_vectors(out, k, x, indices, values):  # parts of kernels cannot be called from Python
    add_rows(out, k, x, indices, values, 0, len(indices))


@njit
def any_width(out, k, x, indices, values):
    _add_rows(out, k, x, indices, values, 0, len(indices))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("add", "N"), [(any_width, 5), (any_width, 16), (whole_vectors, 16), (whole_vectors, 48)]
)
def test_no_other_row_is_touched(add: object, N: int, weighted: bool) -> None:
    x = np.arange(7 * N, dtype=np.float32).reshape(7, N)
    indices = np.array([6, 0, 3, 3, 1, 5], np.int32)
    values = np.full(len(indices), 2.0, np.float32) if weighted else np.empty(0, np.float32)
    out = np.zeros((3, N), np.float32)
    add(out, 1, x, indices, values)  # type: ignore[operator]
    assert (out[1] == x[indices].sum(0) * (2 if weighted else 1)).all()
    assert not out[[0, 2]].any()
