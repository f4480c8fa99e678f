"""Every program of the zoo: upstream, sparse step by step, and fused give the same numbers."""

from __future__ import annotations

from contextlib import nullcontext
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import ZOO, B, M, N, T

import snn_sparse_plugin as ssp

EXACT = {"backprop_threshold": None}
WINDOW = {"backprop_threshold": 0.25, "min_active": 0}


def gridded(net: nn.Module) -> nn.Module:
    """Weights on a binary grid, so that every order of summation gives the same float."""
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() > 1 or (parameter.numel() > 1):
                parameter.copy_((torch.randn(parameter.shape) * 96).round() / 128)
    return net


def outcome(
    name: str, options: dict[str, Any] | None, face: bool = False
) -> tuple[list[Tensor], Tensor | None, Any]:
    entry = ZOO[name]
    pytest.importorskip("norse.torch" if entry.needs == "norse" else entry.needs)
    torch.manual_seed(0)
    upstream = "norse.torch" if entry.needs == "norse" else entry.needs
    library = import_module(f"snn_sparse_plugin.{entry.needs}" if face else upstream)
    net = gridded(entry.build(library))
    x, y = (torch.rand(T, B, M) < 0.4).float(), torch.arange(B) % N
    torch.manual_seed(1)
    with ssp.sparse_mode(**options) if options is not None else nullcontext():
        outputs, loss = entry.program(net, x, y)
        if loss is not None:
            loss.sum().backward()
    grads = {n: p.grad for n, p in net.named_parameters()}
    return [o.detach() for o in outputs], None if loss is None else loss.detach(), grads


def check(found: Any, expected: Any, *, grads: float = 1e-5) -> None:
    for got, want in zip(found[0], expected[0], strict=True):
        assert type(got) is Tensor
        assert (got.dtype, got.shape) == (want.dtype, want.shape)
        binary = bool(((want == 0) | (want == 1)).all())
        torch.testing.assert_close(got, want, rtol=0 if binary else 1e-5, atol=0 if binary else 1e-6)
    assert (found[1] is None) == (expected[1] is None)
    if expected[1] is not None:
        torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-6)
    for name, want in expected[2].items():
        got = found[2][name]
        assert (got is None) == (want is None), name
        if want is not None:
            assert (got - want).norm() <= grads * want.norm() + 1e-7, name


@pytest.mark.parametrize("name", ZOO)
def test_exact(name: str) -> None:
    expected = outcome(name, None)
    check(outcome(name, EXACT | {"fuse_time": False}), expected)
    check(outcome(name, EXACT), expected)


@pytest.mark.parametrize("name", ZOO)
def test_window(name: str) -> None:
    check(outcome(name, WINDOW), outcome(name, WINDOW | {"fuse_time": False}))


@pytest.mark.parametrize("name", ZOO)
def test_swapped_import(name: str) -> None:
    found = outcome(name, EXACT, face=True)
    check(found, outcome(name, None))


@pytest.mark.parametrize("name", ZOO)
def test_bounded_record(name: str) -> None:
    check(outcome(name, EXACT | {"max_steps": 3}), outcome(name, None))


def test_it_is_large_enough() -> None:
    assert len(ZOO) >= 40
