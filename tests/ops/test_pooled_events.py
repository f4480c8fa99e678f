"""Pools of spike events: torch's numbers and gradients, winners of ties and of silent windows included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import torch_threads
from torch import Tensor, nn

from snn_sparse_plugin import SpikeTrain
from snn_sparse_plugin.core.backend import calls
from snn_sparse_plugin.core.convolution import Pool
from snn_sparse_plugin.core.csr import Active, at_active
from snn_sparse_plugin.core.errors import InputError
from snn_sparse_plugin.ops.spiking_conv import max_pool_events, pool_events, pooling, pools_events

T, B = 5, 3
POOLS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "2": (nn.MaxPool2d(2), (3, 8, 8)),
    "odd": (nn.MaxPool2d(2), (3, 7, 9)),
    "ceil": (nn.MaxPool2d(2, ceil_mode=True), (3, 7, 9)),
    "overlapping": (nn.MaxPool2d(3, 2, 1), (4, 9, 8)),
    "overlapping_ceil": (nn.MaxPool2d(3, 2, 1, ceil_mode=True), (4, 10, 8)),
    "gaps": (nn.MaxPool2d(2, 3), (2, 8, 10)),
    "dilated": (nn.MaxPool2d((2, 3), 1, dilation=(3, 2)), (2, 8, 9)),
    "uneven": (nn.MaxPool2d((1, 3), (2, 1), (0, 1)), (1, 5, 6)),
    "whole_map": (nn.MaxPool2d(4), (20, 4, 4)),
    "1d": (nn.MaxPool1d(3, 2, 1), (3, 11)),
    "3d": (nn.MaxPool3d(2, 1, 1), (2, 3, 4, 5)),
}
AVERAGES: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "2": (nn.AvgPool2d(2), (3, 8, 8)),
    "odd": (nn.AvgPool2d(2), (3, 7, 9)),
    "ceil": (nn.AvgPool2d(2, ceil_mode=True), (3, 7, 9)),
    "overlapping": (nn.AvgPool2d(3, 2, 1), (4, 9, 8)),
    "overlapping_ceil": (nn.AvgPool2d(3, 2, 1, ceil_mode=True), (4, 10, 8)),
    "without_padding": (nn.AvgPool2d(3, 1, 1, count_include_pad=False), (2, 5, 7)),
    "gaps": (nn.AvgPool2d(2, 3), (2, 8, 10)),
    "uneven": (nn.AvgPool2d((1, 3), (2, 1), (0, 1)), (1, 5, 6)),
    "divisor": (nn.AvgPool2d((2, 3), divisor_override=4), (2, 5, 6)),
    "whole_map": (nn.AvgPool2d(4), (20, 4, 4)),
    "1d": (nn.AvgPool1d(3, 2, 1), (3, 11)),
    "3d": (nn.AvgPool3d(2, 1, 1), (2, 3, 4, 5)),
}


def spikes(shape: tuple[int, ...], density: float, dtype: torch.dtype = torch.float64) -> Tensor:
    torch.manual_seed(0)
    return (torch.rand(T, B, *shape) < density).to(dtype)


def pooled(pool: nn.Module, x: Tensor) -> Tensor:
    return pool(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def activity(shape: tuple[int, ...], share: float) -> tuple[Tensor, Active]:
    mask = spikes(shape, share, torch.float32)
    train = SpikeTrain.from_dense(mask)
    return mask.double(), Active(train.indptr, train.indices)


@pytest.mark.parametrize("density", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("name", POOLS)
def test_numbers_and_gradients_are_torchs(name: str, density: float) -> None:
    pool, shape = POOLS[name]
    x = spikes(shape, density).requires_grad_()
    expected = pooled(pool, x)
    g = torch.randn_like(expected)
    (wanted,) = torch.autograd.grad(expected, x, g)
    calls.clear()
    found = max_pool_events(SpikeTrain.from_dense(x), pool)
    assert calls["cpu", "pool"] == 1
    assert torch.equal(found.to_dense(), expected)
    SpikeTrain(found.indptr, found.indices, found.shape)  # looks at every row
    torch.testing.assert_close(torch.autograd.grad(found.to_dense(), x, g)[0], wanted, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("density", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("name", POOLS)
def test_active_windows_are_those_whose_winner_is_active(name: str, density: float, share: float) -> None:
    pool, shape = POOLS[name]
    mask, active = activity(shape, share)
    x = spikes(shape, density).requires_grad_()
    expected = pooled(pool, x)
    g = torch.randn_like(expected)
    (wanted,) = torch.autograd.grad(expected, x, g)
    carrier = torch.zeros(active.indices.numel(), dtype=torch.float64, requires_grad=True)
    train = SpikeTrain.from_dense(x.detach())._replace(carrier=carrier, active=active)
    found = max_pool_events(train, pool)
    assert found.active is not None
    SpikeTrain(*found.active, found.shape)
    (got,) = torch.autograd.grad(found.to_dense(), carrier, g)
    torch.testing.assert_close(got, at_active(wanted.flatten(2), active), rtol=1e-14, atol=1e-14)
    # no entry is there for nothing
    of_windows = torch.autograd.grad(pooled(pool, x), x, torch.ones_like(g))[0] * mask
    assert found.active.indices.numel() == int(of_windows.sum())


@pytest.mark.parametrize("graded", [False, True])
@pytest.mark.parametrize("density", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("name", AVERAGES)
def test_averages_and_their_gradients_are_torchs(
    name: str, density: float, graded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pooling, "MOST_SPIKES", float("inf"))
    pool, shape = AVERAGES[name]
    x = spikes(shape, density)
    x = (x * torch.randn_like(x) if graded else x).requires_grad_()
    expected = pooled(pool, x)
    g = torch.randn_like(expected)
    (wanted,) = torch.autograd.grad(expected, x, g)
    calls.clear()
    found = pool_events(SpikeTrain.from_dense(x), pool)
    assert calls["cpu", "pool"] == 1
    torch.testing.assert_close(found.to_dense(), expected, rtol=1e-14, atol=1e-14 if graded else 0)
    SpikeTrain(found.indptr, found.indices, found.shape, found.values)  # looks at every row
    torch.testing.assert_close(torch.autograd.grad(found.to_dense(), x, g)[0], wanted, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("density", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("name", AVERAGES)
def test_every_active_neuron_of_a_window_gets_its_share(
    name: str, density: float, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pooling, "MOST_SPIKES", float("inf"))
    pool, shape = AVERAGES[name]
    mask, active = activity(shape, share)
    x = spikes(shape, density).requires_grad_()
    expected = pooled(pool, x)
    g = torch.randn_like(expected)
    (wanted,) = torch.autograd.grad(expected, x, g)
    carrier = torch.zeros(active.indices.numel(), dtype=torch.float64, requires_grad=True)
    found = pool_events(SpikeTrain.from_dense(x.detach())._replace(carrier=carrier, active=active), pool)
    assert found.active is not None
    SpikeTrain(*found.active, found.shape)
    (got,) = torch.autograd.grad(found.to_dense(), carrier, g)
    torch.testing.assert_close(got, at_active(wanted.flatten(2), active), rtol=1e-14, atol=1e-14)
    assert found.active.indices.numel() == int((pooled(pool, mask) > 0).sum())


@pytest.mark.parametrize("threads", [2, 5])
@pytest.mark.parametrize("pool", [nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(3, 2, 1)], ids=["max", "average"])
def test_any_number_of_threads(pool: nn.Module, threads: int) -> None:
    _, active = activity((4, 9, 8), 0.2)
    carrier = torch.zeros(active.indices.numel(), dtype=torch.float64, requires_grad=True)
    train = SpikeTrain.from_dense(spikes((4, 9, 8), 0.05))._replace(carrier=carrier, active=active)
    g = torch.randn(T, B, 4, 5, 4, dtype=torch.float64)
    found = []
    for n in (1, threads):
        with torch_threads(n):
            out = pool_events(train, pool)
            found.append([out.to_dense(), *torch.autograd.grad(out.to_dense(), carrier, g)])
    for got, want in zip(*found, strict=True):
        assert torch.equal(got, want)


def test_averages_of_many_spikes_are_torchs() -> None:
    train = SpikeTrain.from_dense(spikes((2, 6, 6), 0.3))
    calls.clear()
    assert torch.equal(
        pool_events(train, nn.AvgPool2d(2)).to_dense(), pooled(nn.AvgPool2d(2), train.to_dense())
    )
    assert not calls["cpu", "pool"]


@pytest.mark.parametrize("pool", [nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(3, 2, 1)], ids=["max", "average"])
def test_twice(pool: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pooling, "MOST_SPIKES", float("inf"))
    x = spikes((2, 5, 6), 0.2).requires_grad_()
    g = torch.randn(T, B, 2, 3, 3, dtype=torch.float64, requires_grad=True)

    def second(out: Tensor) -> Tensor:
        (first,) = torch.autograd.grad(out, x, g, create_graph=True)
        return torch.autograd.grad(first.pow(3).sum(), g)[0]

    torch.testing.assert_close(
        second(pool_events(SpikeTrain.from_dense(x), pool).to_dense()), second(pooled(pool, x))
    )


def test_no_gradient_no_list() -> None:
    _, active = activity((2, 4, 4), 0.5)
    train = SpikeTrain.from_dense(spikes((2, 4, 4), 0.5))
    for given in (train, train._replace(active=active)):
        found = max_pool_events(given, nn.MaxPool2d(2))
        assert not found.requires_grad
        assert found.active is None
    assert found.dtype == torch.float64
    assert found.shape == (T, B, 2, 2, 2)


@pytest.mark.parametrize(
    ("pool", "shape"),
    [
        (nn.MaxPool2d(2, 1, 1, dilation=4), (2, 5, 5)),  # windows that skip over the map
    ],
)
def test_what_torch_pools(pool: Any, shape: tuple[int, ...]) -> None:
    x = spikes(shape, 0.3)
    calls.clear()
    assert torch.equal(max_pool_events(SpikeTrain.from_dense(x), pool).to_dense(), pooled(pool, x))
    assert not calls["cpu", "pool"]


def test_graded_trains_are_pooled_by_torch() -> None:
    x = (spikes((2, 6, 6), 0.4) * torch.randn(T, B, 2, 6, 6, dtype=torch.float64)).requires_grad_()
    train, pool = SpikeTrain.from_dense(x), nn.MaxPool2d(2)
    expected = pooled(pool, x)
    found = max_pool_events(train, pool)
    g = torch.randn_like(expected)
    assert torch.equal(found.to_dense(), expected)
    assert torch.equal(*(torch.autograd.grad(out, x, g)[0] for out in (found.to_dense(), expected)))
    assert not pools_events(train, Pool("max", (2, 2), (2, 2), (0, 0), (1, 1)))


def test_bad_input() -> None:
    train = SpikeTrain.from_dense(spikes((2, 6, 6), 0.4))
    with pytest.raises(InputError, match=r"takes \(T, B, C, \*size\), got \(5, 3, 72\)"):
        max_pool_events(train.flatten(), nn.MaxPool2d(2))
    with pytest.raises(InputError, match="pool is a MaxPool2d"):
        max_pool_events(train, nn.MaxPool1d(2))
    with pytest.raises(InputError, match="only a max-pool"):
        max_pool_events(train, nn.AvgPool2d(2))
    with pytest.raises(InputError, match="or an AvgPool1d"):
        pool_events(train.view(2, 36), nn.AvgPool2d(2))
    with pytest.raises(InputError, match="needs a pool"):
        pool_events(train, None)
    for pool in (nn.MaxPool2d(7), nn.MaxPool2d(2, 2, 2), nn.AvgPool2d(7), nn.AvgPool2d(2, 2, 2)):
        with pytest.raises(RuntimeError):  # torch's own words
            pool_events(train, pool)
