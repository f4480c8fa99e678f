"""Infinite and NaN parameters, weights and inputs, nothing at all, and sums of very many terms."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snn_sparse_plugin as ssp
from snn_sparse_plugin import NeuronParams, NeuronSpec, Surrogate
from snn_sparse_plugin.core.errors import NonFiniteError
from snn_sparse_plugin.ops import spiking_layer

INF, NAN = float("inf"), float("nan")


@pytest.fixture
def snn() -> Any:
    return pytest.importorskip("snntorch")


CASES: dict[str, tuple[dict[str, Any], Any]] = {
    "a threshold that nobody reaches": ({"threshold": INF, "reset_mechanism": "none"}, None),
    "such a threshold with a reset": ({"threshold": INF}, None),
    "one neuron that never fires": ({"threshold": torch.tensor([0.3, INF, 0.3, 0.3])}, None),
    "a negative threshold": ({"threshold": -0.5}, None),
    "decay 0": ({"beta": 0.0}, None),
    "decay 1": ({"beta": 1.0}, None),
    "decay above 1": ({"beta": 1.5}, None),
    "decay NaN": ({"beta": NAN}, None),
    "threshold NaN": ({"threshold": NAN}, None),
    "an infinite weight": ({}, lambda layer, x: layer.weight.data[0, 0].fill_(INF)),
    "an infinite weight that meets no spike": (
        {},
        lambda layer, x: (layer.weight.data[0, 0].fill_(INF), x[:, :, 0].zero_()),
    ),
    "a NaN weight": ({}, lambda layer, x: layer.weight.data[1, 2].fill_(NAN)),
    "an infinite bias": ({}, lambda layer, x: layer.bias.data[1].fill_(-INF)),
    "an infinite input": ({}, lambda layer, x: x[3, 1, 2].fill_(INF)),
    "a NaN input": ({}, lambda layer, x: x[3, 1, 2].fill_(NAN)),
    "an overflow": ({"beta": 1.0, "threshold": 1e38}, lambda layer, x: layer.weight.data.fill_(3e37)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("swapped", [False, True], ids=["mode", "sparsify"])
def test_a_loop_carries_on_what_upstream_carries_on(name: str, swapped: bool, snn: Any) -> None:
    options, change = CASES[name]

    def run(sparse: bool) -> list[Any]:
        torch.manual_seed(0)
        layer, neuron = nn.Linear(6, 4), snn.Leaky(**{"beta": 0.9, "threshold": 0.3, **options})
        x = (torch.rand(8, 3, 6) < 0.5).float()
        if change is not None:
            change(layer, x)
        if sparse and swapped:
            ssp.sparsify(neuron, backprop_threshold=None, min_active=0)
        block = (
            ssp.sparse_mode(backprop_threshold=None, min_active=0)
            if sparse and not swapped
            else nullcontext()
        )
        with block:
            for _ in range(2):
                mem, out = torch.zeros(3, 4), []
                for step in x:
                    spikes, mem = neuron(layer(step), mem)
                    out.append(spikes)
                stacked = torch.stack(out)
                if bool(torch.isfinite(mem).all()):
                    layer.zero_grad()
                    (stacked.sum() + mem.sum()).backward()
            return [stacked.detach(), mem.detach(), layer.weight.grad, layer.bias.grad]

    for got, want in zip(run(True), run(False), strict=True):
        if want is None:
            assert got is None
        else:
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("what", ["weight", "weight that meets no spike", "threshold", "beta", "bias"])
def test_the_op_refuses_it_in_every_backend(what: str, backend: str) -> None:
    x, weight, bias = torch.ones(3, 2, 4), torch.rand(5, 4), torch.zeros(5)
    params = NeuronParams(NAN if what == "beta" else 0.9, threshold=INF if what == "threshold" else 1.0)
    if what == "bias":
        bias[2] = NAN
    if what.startswith("weight"):
        weight[0, 0] = INF
    if what == "weight that meets no spike":
        x[:, :, 0] = 0
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        spiking_layer(x, weight, bias, params=params, backend=backend)


@pytest.mark.parametrize("shape", [(0, 2, 4, 5), (3, 0, 4, 5), (3, 2, 0, 5), (3, 2, 4, 0), (0, 0, 0, 0)])
def test_nothing_is_the_same_in_every_backend(shape: tuple[int, int, int, int]) -> None:
    T, B, M, N = shape
    found = []
    for backend in ("cpu", "reference"):
        weight, x = torch.zeros(N, M, requires_grad=True), torch.zeros(T, B, M, requires_grad=True)
        out = spiking_layer(
            x, weight, params=NeuronParams(0.9), surrogate=Surrogate("fast_sigmoid", (25.0,)), backend=backend
        )
        (out.spikes.sum() + out.state.v.sum()).backward()
        found.append((out.spikes, out.state.v, weight.grad, x.grad, out.active_fraction))
    for a, b in zip(*found, strict=True):
        if isinstance(a, Tensor):
            assert a.shape == b.shape
            assert torch.equal(a, b)
        else:
            assert a == b


@pytest.mark.parametrize("which", ["beta", "threshold"])
@pytest.mark.parametrize(("T", "B", "N"), [(50, 4, 7), (200, 32, 64), (500, 64, 33)])
def test_one_parameter_of_all_neurons_keeps_its_digits(which: str, T: int, B: int, N: int) -> None:
    torch.manual_seed(0)
    # on a binary grid, so that spikes are the same in both precisions
    x = (torch.rand(T, B, 20) < 0.2).double()
    weight = torch.randint(-40, 80, (N, 20)).double() / 256
    upstream = torch.rand(T, B, N).double()
    grads = []
    for dtype in (torch.float64, torch.float32):
        value = torch.tensor(0.75 if which == "beta" else 1.0, dtype=dtype, requires_grad=True)
        params = NeuronParams(value) if which == "beta" else NeuronParams(0.75, threshold=value)
        out = spiking_layer(
            x.to(dtype),
            weight.to(dtype),
            params=params,
            spec=NeuronSpec(),
            surrogate=Surrogate("fast_sigmoid", (25.0,)),
            backprop_threshold=None,
            backend="cpu",
        )
        (out.spikes * upstream.to(dtype)).sum().backward()
        grads.append(value.grad.double())
    assert float((grads[1] - grads[0]).abs() / grads[0].abs()) < 2e-6
