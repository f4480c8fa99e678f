"""What the CPU's kernels are made of: exp as arithmetic, a product in a kernel, columns of set bits."""

from functools import cache

import numba
import numpy as np
import pytest
import torch

from snn_sparse_plugin import NeuronParams, Surrogate
from snn_sparse_plugin.backends.cpu.bits import append_columns, pick_values
from snn_sparse_plugin.backends.cpu.exponential import exp_negative
from snn_sparse_plugin.backends.cpu.layout import zero_rows
from snn_sparse_plugin.backends.cpu.multiply import multiply_kernel, panels_of
from snn_sparse_plugin.backends.product import ProductGrad
from snn_sparse_plugin.ops import spiking_layer


@numba.njit
def exp_of(x, out):
    for j in range(x.shape[0]):
        out[j] = exp_negative(x[j])


@pytest.mark.parametrize(("dtype", "exact", "lowest"), [("f4", "f8", -87.3), ("f8", "g", -708.0)])
def test_exp_is_within_two_units_in_the_last_place(dtype, exact, lowest):
    random = np.random.default_rng(0).random(300_000)
    x = (lowest * np.concatenate([random, random**8])).astype(dtype)
    out = np.empty_like(x)
    exp_of(x, out)
    expected = np.exp(x.astype(exact))
    assert np.max(np.abs(out - expected) / np.spacing(expected.astype(dtype))) <= 2


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_exp_of_the_ends_and_of_nan(dtype):
    x = np.array([0.0, -0.0, -1e30, -np.inf, np.nan], dtype)
    out = np.empty_like(x)
    exp_of(x, out)
    assert out[:4].tolist() == [1.0, 1.0, 0.0, 0.0]
    assert np.isnan(out[4])


@cache
def product_of(by_two):
    multiply = multiply_kernel(by_two)

    @numba.njit
    def product(nu, panels, start, stop, b, block, row, factor):
        multiply(nu, panels, start, stop, b, block, row, factor)

    return product


@pytest.mark.parametrize("by_two", [False, True])
@pytest.mark.parametrize("steps", [1, 4, 5, 6, 8, 13, 32])
@pytest.mark.parametrize(("K", "M"), [(1, 1), (20, 63), (127, 130)])
def test_the_product_of_a_chunk(steps, K, M, by_two):
    g = torch.Generator().manual_seed(steps)
    nu, weight = torch.randn(40, 2, K, generator=g), torch.randn(K, M, generator=g)
    block, factors = zero_rows(80, M, np.dtype("f4")), torch.randn(steps, M, generator=g)
    block[45 : 45 + steps, :M] = factors
    product = product_of(by_two)
    product(nu.numpy(), panels_of(weight, np.dtype("f4")), 3, 3 + steps, 1, block, 2, 45)
    expected = factors * (nu[3 : 3 + steps, 1] @ weight)
    torch.testing.assert_close(torch.from_numpy(block)[2 : 2 + steps, :M], expected, rtol=1e-4, atol=1e-4)
    assert not block[2 + steps : 45].any()
    assert not block[:2].any()


@numba.njit
def columns_of(masks, rows, out, picked):
    n = 0
    for k in range(masks.shape[0]):
        pick(masks[k], rows, 16 * k, picked, n)
        n = append_columns(masks[k], 16 * k, out, n)
    return n


pick = pick_values(np.dtype("f4"))


def test_columns_and_values_of_set_bits():
    random = np.random.default_rng(0)
    set_bits = random.random((400, 16)) < random.random((400, 1))
    masks = (set_bits << np.arange(16)).sum(1).astype(np.uint32)
    rows = random.random(set_bits.size).astype("f4")
    out, picked = np.empty(rows.size + 16, np.int32), np.empty(rows.size + 16, np.float32)
    n = columns_of(masks, rows, out, picked)
    (expected,) = set_bits.reshape(-1).nonzero()
    assert out[:n].tolist() == expected.tolist()
    assert picked[:n].tolist() == rows[expected].tolist()


def test_a_wide_layer_on_a_wide_one_multiplies_no_dense_gradient(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    g = torch.Generator().manual_seed(0)
    x = (torch.rand(35, 3, 50, generator=g) < 0.1).float()
    weights = [torch.randn(90, 50, generator=g), torch.randn(100, 90, generator=g)]
    upstream = torch.randn(35, 3, 100, generator=g)

    def gradients(backend):
        leaves = [w.clone().requires_grad_() for w in weights]
        options = {
            "params": NeuronParams(0.9),
            "surrogate": Surrogate("atan", (2.0,)),
            "backprop_threshold": None,
            "backend": backend,
        }
        hidden = spiking_layer(x, leaves[0], events=True, **options).spikes
        out = spiking_layer(hidden, leaves[1], **options).spikes
        return torch.autograd.grad((out * upstream).sum(), leaves)

    expected = gradients("reference")
    monkeypatch.setattr(ProductGrad, "dense", lambda self: pytest.fail("the product was made"))
    for found, want in zip(gradients("cpu"), expected, strict=True):
        assert (found - want).norm() < 1e-5 * want.norm()
