"""Memory of tensors as arrays: shared, kept, and not noted on the tensor."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch

from snn_sparse_plugin.backends.cpu.layout import aligned
from snn_sparse_plugin.backends.cpu.memory import array

DTYPES = (torch.float32, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (5,), (3, 4, 2)], ids=str)
def test_an_array_has_the_numbers_of_its_tensor(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.randint(0, 2, shape).to(dtype)
    found = array(x)
    assert found.shape == shape
    assert found.flags.c_contiguous
    assert found.flags.writeable
    assert np.array_equal(found, np.array(x.tolist(), found.dtype).reshape(shape))


def test_memory_is_shared_and_lives_as_long_as_the_array() -> None:
    x = torch.zeros(1000)
    found = array(x[10:20])
    found[3] = 7
    assert x[13] == 7
    x[14] = 8
    del x
    gc.collect()
    torch.ones(1000)
    assert found.tolist() == [0, 0, 0, 7, 8, 0, 0, 0, 0, 0]


def test_what_is_not_contiguous_is_copied() -> None:
    x = torch.arange(6.0).view(2, 3).t().requires_grad_()
    assert array(x).tolist() == [[0, 3], [1, 4], [2, 5]]


def test_the_tensor_can_be_resized_still() -> None:
    x = torch.zeros(4)
    array(x)
    assert x.untyped_storage().resizable()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_aligned_rows_begin_at_a_cache_line(dtype: str) -> None:
    for rows, columns in [(0, 16), (1, 16), (3, 48), (100, 208)]:
        found = aligned(rows, columns, np.dtype(dtype), np.zeros)
        assert found.shape == (rows, columns)
        assert found.ctypes.data % 64 == 0
        assert found.flags.c_contiguous
        assert not found.any()


@pytest.mark.parametrize("N", [5, 1 << 18], ids=["numpy's copy", "torch's"])
def test_arrays_of_tensors_in_another_order(N):
    x = torch.randn(4, N)
    assert array(x).ctypes.data == x.data_ptr()
    for other in (x.t(), x[:, ::2], x[1:2].expand(3, N), torch.complex(x, x).conj().imag):
        found = array(other)
        assert found.flags.c_contiguous
        np.testing.assert_array_equal(found, other.tolist() if N == 5 else other.contiguous().numpy())
    assert array(x.t(), (2, 2 * N)).shape == (2, 2 * N)
