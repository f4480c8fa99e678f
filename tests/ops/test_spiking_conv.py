"""The op of a convolution and neurons: its ways against plain torch, and what it says about bad input."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snn_sparse_plugin.backends.cpu import CPUBackend
from snn_sparse_plugin.core.backend import calls
from snn_sparse_plugin.core.csr import at_active
from snn_sparse_plugin.core.dynamics import NeuronParams
from snn_sparse_plugin.core.errors import InputError
from snn_sparse_plugin.core.spikes import SpikeTrain
from snn_sparse_plugin.core.surrogates import Surrogate
from snn_sparse_plugin.ops import spiking_conv, spiking_layer
from snn_sparse_plugin.ops.spiking_conv import convolve, library

T, B = 5, 3


def normed(dims: int, channels: int, affine: bool = True) -> nn.Module:
    """A batch norm in eval mode whose numbers are on no grid, one of them negative."""
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1](channels, affine=affine).double().eval()
    torch.manual_seed(2)
    norm.running_mean.normal_()  # type: ignore[operator, union-attr]
    norm.running_var.uniform_(0.1, 2)  # type: ignore[operator, union-attr]
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return norm


CASES: dict[str, tuple[int, tuple[int, ...], dict[str, Any]]] = {
    # channels out, kernel, options
    "plain": (6, (3, 3), {}),
    "pooled": (6, (3, 3), {"pool": nn.MaxPool2d(2)}),
    "pool_with_borders": (6, (3, 2), {"pool": nn.MaxPool2d(3, 2, 1, ceil_mode=True), "padding": 1}),
    "averaged": (6, (3, 3), {"pool": nn.AvgPool2d(2, count_include_pad=False, padding=1), "stride": (2, 1)}),
    "groups": (6, (3, 3), {"groups": 2, "dilation": (1, 2), "padding": "same", "pool": nn.MaxPool2d((2, 1))}),
    "normed": (6, (3, 3), {"norm": normed(2, 6), "pool": nn.MaxPool2d(2), "padding": 1}),
    "normed_narrow": (3, (3, 3), {"norm": normed(2, 3, affine=False), "stride": 2}),
    "normed_groups": (18, (2, 3), {"norm": normed(2, 18), "groups": 2, "pool": nn.AvgPool2d(3, 2, 1)}),
    "normed_line": (20, (3,), {"norm": normed(1, 20)}),
    "line": (4, (3,), {"stride": 2, "padding": 1, "pool": nn.MaxPool1d(2)}),
    "volume": (4, (2, 2, 2), {"pool": nn.AvgPool3d(2)}),
}


def case(name: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    channels, kernel, options = CASES[name]
    torch.manual_seed(0)
    x = (torch.rand(T, B, 4, *(9, 8, 6)[: len(kernel)]) < 0.2).to(dtype)
    inner = 4 // options.get("groups", 1)
    weight = (torch.randn(channels, inner, *kernel, dtype=dtype) * 16).round() / 16
    bias = (torch.randn(channels, dtype=dtype) * 16).round() / 16
    if "norm" in options:
        options = options | {"norm": copy.deepcopy(options["norm"]).to(dtype)}
    return x, weight.requires_grad_(), bias.requires_grad_(), options


def leaves_of(*leaves: Tensor, **options: Any) -> list[Tensor]:
    """Those that take a gradient."""
    return [p for p in (*leaves, *options.get("norm", nn.Identity()).parameters()) if p.requires_grad]


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, options: dict[str, Any]) -> Tensor:
    given = {k: v for k, v in options.items() if k not in ("pool", "norm")}
    out = (F.conv1d, F.conv2d, F.conv3d)[weight.dim() - 3](x.flatten(0, 1), weight, bias, **given)
    out = options.get("norm", nn.Identity())(out)
    return options.get("pool", nn.Identity())(out).unflatten(0, x.shape[:2])


@pytest.fixture(params=["events", "product", "product, a step at a time"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(CPUBackend, "prefers_events", lambda *a, **k: request.param == "events")
    if "step" in request.param:
        monkeypatch.setattr(library, "CHUNK_BYTES", 1)
    calls.clear()
    return str(request.param)


@pytest.mark.parametrize("name", CASES)
def test_current_and_gradients_are_those_of_torch(name: str, way: str) -> None:
    x, weight, bias, options = case(name)
    for given in (x, SpikeTrain.from_dense(x), x.clone().requires_grad_(), 1.5 * x):
        dense = given.to_dense() if isinstance(given, SpikeTrain) else given
        leaves = leaves_of(weight, bias, dense, **options)
        expected = plain(dense, weight, bias, options)
        found = convolve(given, weight, bias, **options)
        assert torch.equal(found, expected)
        arriving = torch.randn_like(expected)
        for got, want in zip(
            torch.autograd.grad(found, leaves, arriving),
            torch.autograd.grad(expected, leaves, arriving),
            strict=True,
        ):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert calls["cpu" if way == "events" else "torch", "convolution"] == 4


@pytest.mark.parametrize("name", CASES)
def test_a_train_takes_its_gradient_where_its_neurons_were_active(name: str, way: str) -> None:
    x, weight, bias, options = case(name)
    dense = x.clone().requires_grad_()
    before = spiking_layer(
        dense * 0.6 + 0.3, params=NeuronParams(mem=0.5), events=True, backprop_threshold=0.05, min_active=0
    )
    train = before.spikes
    assert train.active is not None
    as_tensor = train.to_dense().detach().requires_grad_()
    expected = plain(as_tensor, weight, bias, options)
    found = convolve(train, weight, bias, **options)
    assert torch.equal(found, expected)
    arriving = torch.randn_like(expected)
    (want,) = torch.autograd.grad(expected, as_tensor, arriving)
    got = torch.autograd.grad(found, [train.carrier, weight, bias], arriving, retain_graph=True)[0]
    torch.testing.assert_close(got, at_active(want.flatten(2), train.active), rtol=1e-12, atol=1e-12)
    assert torch.autograd.grad(found, dense, arriving)[0].isfinite().all()


@pytest.mark.parametrize("name", ["pooled", "groups", "line", "normed_line"])
def test_second_derivatives(name: str, way: str) -> None:
    x, weight, bias, options = case(name)
    x = x[(slice(1), slice(1), slice(None), *[slice(5)] * (x.dim() - 3))]
    noisy = (x + 0.01 * torch.rand_like(x)).requires_grad_()  # no two maxima are equal

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return convolve(x, weight, bias, **options)

    assert torch.autograd.gradcheck(run, (noisy, weight, bias), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, (noisy, weight, bias), fast_mode=True)


@pytest.mark.parametrize("name", CASES)
def test_neurons_behind_it(name: str, way: str) -> None:
    x, weight, bias, options = case(name, torch.float32)
    neurons: dict[str, Any] = {
        "params": NeuronParams(mem=0.875),
        "return_mem": True,
        "backprop_threshold": None,
    }
    found = spiking_conv(SpikeTrain.from_dense(x), weight, bias, **options, **neurons)
    expected = spiking_layer(plain(x, weight, bias, options), **neurons)
    assert torch.equal(found.spikes, expected.spikes)
    assert torch.equal(found.mem, expected.mem)
    assert found.state.v.shape == expected.spikes.shape[1:]
    leaves = leaves_of(weight, bias, **options)
    for got, want in zip(
        torch.autograd.grad(found.mem.square().mean(), leaves),
        torch.autograd.grad(expected.mem.square().mean(), leaves),
        strict=True,
    ):
        assert (got - want).norm() <= 1e-5 * want.norm()


def test_ties_and_nan_of_a_max_pool(way: str) -> None:
    weight = torch.ones(1, 1, 1, 1, requires_grad=True)
    x = (
        torch.tensor([[0.0, 0, 1, 1], [0, 0, 1, 0], [2, 0, 0, 3], [0, 2, 3, 0]])
        .view(1, 1, 1, 4, 4)
        .requires_grad_()
    )
    pool = nn.MaxPool2d(2)
    for given in (x, torch.where(x == 3, torch.nan, x).detach().requires_grad_()):
        found = convolve(given, weight, pool=pool)
        expected = pool(given.flatten(0, 1)).unflatten(0, (1, 1))
        torch.testing.assert_close(found, expected, equal_nan=True)
        got, want = (torch.autograd.grad(out.nan_to_num().sum(), given)[0] for out in (found, expected))
        assert torch.equal(got, want)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_is_seen_where_no_spike_reaches_it(bad: float, way: str) -> None:
    x, weight = torch.zeros(T, B, 2, 5, 5), torch.ones(3, 2, 3, 3)
    x[0, 0, 0, 2, 2] = 1
    weight[1, 1, 0, 0] = bad
    torch.testing.assert_close(convolve(x, weight), plain(x, weight, None, {}), equal_nan=True)


@pytest.mark.parametrize(
    "shape",
    [(0, 2, 3, 5, 5), (4, 0, 3, 5, 5), (1, 1, 3, 1, 1), (4, 2, 1, 3, 3)],
    ids=lambda s: "x".join(map(str, s)),
)
def test_small_and_empty(shape: tuple[int, ...], way: str) -> None:
    kernel = (1, 1) if shape[3] == 1 else (3, 3)
    weight = torch.randn(2, shape[2], *kernel, requires_grad=True)
    x = torch.zeros(shape)
    for given in (x, torch.ones(shape)):
        found = convolve(given, weight)
        assert found.shape == (*shape[:2], 2, *(n - k + 1 for n, k in zip(shape[3:], kernel, strict=True)))
        if given.numel():
            torch.testing.assert_close(found, plain(given, weight, None, {}), rtol=1e-5, atol=1e-5)
        (grad,) = torch.autograd.grad(found.sum(), weight)
        assert grad.shape == weight.shape


def test_without_gradients_nothing_is_kept(way: str) -> None:
    x, weight, bias, options = case("pooled")
    with torch.no_grad():
        found = convolve(x, weight, bias, **options)
    assert not found.requires_grad
    assert torch.equal(found, plain(x, weight, bias, options).detach())


def test_a_graph_of_the_compiler_has_torchs_convolution() -> None:
    x, weight, bias, _ = case("plain")
    seen = []

    def backend(graph: Any, inputs: Any) -> Any:
        seen.append(str(graph.graph))
        return graph.forward

    found = torch.compile(lambda x: convolve(x, weight, bias), backend=backend, fullgraph=True)(x)
    torch.testing.assert_close(found, plain(x, weight, bias, {}))
    assert "conv2d" in seen[0]


@pytest.mark.parametrize(
    ("x", "weight", "options", "words"),
    [
        ((T, B, 3, 8, 8), (4, 2, 3, 3), {}, r"3 channels, a weight \(4, 2, 3, 3\) and 1 group"),
        ((T, B, 4, 8, 8), (3, 2, 3, 3), {"groups": 2}, "2 group"),
        ((B, 2, 8, 8), (4, 2, 3, 3), {}, r"takes \(T, B, C, size, size\), got \(3, 2, 8, 8\)"),
        (
            (T, B, 2, 2, 8),
            (4, 2, 5, 3),
            {"padding": 1},
            r"kernel \(5, 3\) is larger than the padded map \(4, 10\)",
        ),
        ((T, B, 2, 8, 8), (4, 2), {}, "one to three dimensions"),
        ((T, B, 2, 8, 8), (4, 2, 2, 2), {"padding": "same"}, "F.pad first"),
        ((T, B, 2, 8, 8), (4, 2, 3, 3), {"stride": (1, 2, 3)}, "stride has 3 entries"),
        ((T, B, 2, 8, 8), (4, 2, 3, 3), {"pool": nn.MaxPool1d(2)}, "pool is a MaxPool2d"),
        ((T, B, 2, 8, 8), (4, 2, 3, 3), {"pool": nn.ReLU()}, "or an AvgPool2d"),
        ((T, B, 2, 8, 8), (4, 2, 3, 3), {"norm": nn.BatchNorm1d(4).eval()}, "norm is a BatchNorm2d"),
        ((T, B, 2, 8, 8), (4, 2, 3, 3), {"norm": nn.BatchNorm2d(4)}, "in eval mode and with running"),
        (
            (T, B, 2, 8, 8),
            (4, 2, 3, 3),
            {"norm": nn.BatchNorm2d(3).eval()},
            r"mean of the batch norm is torch.float32 of shape \(3,\) on cpu, the convolution has 4 channels",
        ),
    ],
)
def test_what_does_not_fit(x: Any, weight: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        convolve(torch.zeros(x), torch.zeros(weight), **options)


def test_dtypes_that_differ() -> None:
    with pytest.raises(InputError, match=r"weight is torch.float64 on cpu, the input torch.float32"):
        convolve(torch.zeros(T, B, 2, 8, 8), torch.zeros(4, 2, 3, 3, dtype=torch.float64))
    with pytest.raises(InputError, match="floating"):
        convolve(torch.zeros(T, B, 2, 8, 8, dtype=torch.int64), torch.zeros(4, 2, 3, 3))
    with pytest.raises(InputError, match="got list"):
        convolve([1.0], torch.zeros(4, 2, 3, 3))


def test_memory_formats_and_strides(way: str) -> None:
    x, weight, bias, options = case("pooled", torch.float32)
    last = weight.detach().to(memory_format=torch.channels_last).requires_grad_()
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    found = convolve(strided, last, bias, **options)
    assert torch.equal(found, plain(x, weight, bias, options))
    for got, want in zip(
        torch.autograd.grad(found.square().sum(), [last, bias]),
        torch.autograd.grad(plain(x, weight, bias, options).square().sum(), [weight, bias]),
        strict=True,
    ):
        assert (got - want).norm() <= 1e-5 * want.norm()


class Cut(torch.autograd.Function):
    """A spike whose surrogate is cut at a distance from threshold."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, window: float) -> Tensor:
        ctx.save_for_backward(u)
        ctx.window = window
        return (u > 0).to(u.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (u,) = ctx.saved_tensors
        return grads[0] / (25 * u.abs() + 1) ** 2 * (u.abs() < ctx.window), None


@pytest.mark.parametrize("window", [0.1, 0.4, torch.inf])
def test_the_sparse_gradient_is_the_dense_one_with_its_surrogate_cut(window: float, way: str) -> None:
    """Through convolution, pool and neurons twice and a linear readout, against a loop in plain torch."""
    torch.manual_seed(3)
    x = (torch.rand(12, B, 2, 14, 14) < 0.05).double()
    shapes = ((6, 2, 3, 3), (8, 6, 3, 3), (4, 8 * 2 * 2))
    first, second, out = weights = [
        torch.randn(s, dtype=torch.float64).mul(0.4).requires_grad_() for s in shapes
    ]
    pool = nn.MaxPool2d(2)

    mems, counted = [torch.zeros((), dtype=torch.float64)] * 2, []
    for step in x:
        for k, weight in enumerate((first, second)):
            reset = (mems[k].detach() > 1).double()
            mems[k] = 0.875 * mems[k] + pool(F.conv2d(step, weight)) - reset
            step = Cut.apply(mems[k] - 1, window)
        counted.append(step)
    expected = torch.autograd.grad(
        F.linear(torch.stack(counted).sum(0).flatten(1), out).square().sum(), weights
    )

    options: dict[str, Any] = {
        "pool": pool,
        "params": NeuronParams(mem=0.875),
        "surrogate": Surrogate("fast_sigmoid", (25.0,)),
        "events": True,
        "backprop_threshold": None if window == torch.inf else window,
        "min_active": 0,
    }
    hidden = spiking_conv(SpikeTrain.from_dense(x), first, **options).spikes
    assert isinstance(hidden, SpikeTrain)
    spikes = spiking_conv(hidden, second, **options).spikes
    assert isinstance(spikes, SpikeTrain)
    assert torch.equal(spikes.to_dense(), torch.stack(counted))
    found = torch.autograd.grad(F.linear(spikes.counts().flatten(1), out).square().sum(), weights)
    for got, want in zip(found, expected, strict=True):
        assert want.any()
        assert (got - want).norm() <= 1e-12 * want.norm()
