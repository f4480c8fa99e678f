"""Derivatives of second order: upstream's, through recorded loops and the op, or an error."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import snntorch
import torch
from snntorch import surrogate
from torch import nn
from torch.func import functional_call

import snn_sparse_plugin as ssp
from snn_sparse_plugin import Surrogate, sparse_mode
from snn_sparse_plugin.core.dynamics import NeuronParams, NeuronSpec
from snn_sparse_plugin.core.errors import FusionError
from snn_sparse_plugin.core.spikes import SpikeTrain
from snn_sparse_plugin.ops.spiking_layer import spiking_layer

norse = pytest.importorskip("norse.torch")

SURROGATES = {
    "atan": surrogate.atan,
    "fast_sigmoid": lambda: surrogate.fast_sigmoid(5),
    "sigmoid": lambda: surrogate.sigmoid(5),
    "heaviside": surrogate.heaviside,
    "straight_through": surrogate.straight_through_estimator,
    "triangular": surrogate.triangular,
    "SFS": lambda: surrogate.SFS(5, 0.1),
}


def net(neuron: Any, seed: int = 0) -> nn.ModuleList:
    torch.manual_seed(seed)
    layers = nn.ModuleList([nn.Linear(20, 16), neuron(), nn.Linear(16, 5), neuron()])
    nn.init.uniform_(layers[0].weight, -0.5, 1)
    return layers


def loss_of(layers: Any, x: torch.Tensor) -> torch.Tensor:
    first, lif1, second, lif2 = layers
    is_norse = not isinstance(lif1, snntorch.SpikingNeuron)
    state1, state2, out = *((None, None) if is_norse else (torch.zeros(1),) * 2), []
    for frame in x:
        hidden, state1 = lif1(first(frame), state1)
        spikes, state2 = lif2(second(hidden), state2)
        out.append(spikes + (0 if is_norse else state2))
    return torch.stack(out).pow(2).mean() + torch.stack(out).mean()


def inputs() -> torch.Tensor:
    return (torch.rand(9, 4, 20, generator=torch.Generator().manual_seed(1)) < 0.5).float()


def penalised(layers: Any, context: Any) -> list[torch.Tensor]:
    """First gradients, and those of their squares."""
    x = inputs().requires_grad_()
    with context:
        loss = loss_of(layers, x)
    of = [layers[0].weight, layers[2].weight, x]
    first = torch.autograd.grad(loss, of, create_graph=True)
    second = torch.autograd.grad(sum(g.pow(2).sum() for g in first), of)
    return [*(g.detach() for g in first), *second]


def compare(found: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float = 1e-5) -> None:
    assert float(expected[-1].norm()) > 0
    for got, want in zip(found, expected, strict=True):
        assert float((got - want).norm()) <= tolerance * float(want.norm())


@pytest.mark.parametrize("name", SURROGATES)
def test_gradient_penalty_of_a_recorded_loop(name, counted):
    def neuron():
        return snntorch.Leaky(0.9, spike_grad=SURROGATES[name]())

    want = penalised(net(neuron), nullcontext())
    compare(penalised(net(neuron), sparse_mode(backprop_threshold=None)), want)
    # fused, as one node; each layer is made again for the gradient of the gradient
    assert counted["cpu", "forward"] == 2 + 2


@pytest.mark.parametrize(
    "neuron",
    [
        lambda: snntorch.Leaky(0.9, reset_delay=False),
        lambda: snntorch.Lapicque(0.9),
        lambda: norse.LIFCell(norse.LIFParameters(tau_mem_inv=torch.tensor(300.0), v_th=torch.tensor(0.3))),
    ],
    ids=["attached reset", "equations", "norse"],
)
def test_gradient_penalty_of_other_neurons(neuron):
    want = penalised(net(neuron), nullcontext())
    compare(penalised(net(neuron), sparse_mode(backprop_threshold=None)), want)


def test_hessian_vector_products():
    found = []
    for context in (nullcontext(), sparse_mode(backprop_threshold=None)):
        layers = net(lambda: snntorch.Leaky(0.9))
        weight = layers[0].weight
        with context:
            loss = loss_of(layers, inputs())
        (first,) = torch.autograd.grad(loss, weight, create_graph=True)
        found.append(torch.autograd.grad(first, weight, torch.ones_like(first)))
    compare(*found)


def test_functional_hessian():
    def of_bias(bias, layers):
        return loss_of([lambda x: nn.functional.linear(x, layers[0].weight, bias), *layers[1:]], inputs())

    found = []
    for context in (nullcontext(), sparse_mode(backprop_threshold=None)):
        layers = net(lambda: snntorch.Leaky(0.9))
        with context:
            found.append([torch.autograd.functional.hessian(lambda b: of_bias(b, layers), torch.zeros(16))])  # noqa: B023
    compare(*found)


@pytest.mark.parametrize("unrolled", [False, True], ids=["recorded", "unroll"])
def test_a_step_of_maml(unrolled):
    def adapted(context: Any, through_unroll: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Linear(20, 16), snntorch.Leaky(0.9, init_hidden=True))
        nn.init.uniform_(layers[0].weight, -0.5, 1)
        names = dict(layers.named_parameters())

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.layers = layers

            def forward(self, x):
                layers[1].reset_mem()
                if through_unroll:
                    return ssp.unroll(layers, x, backprop_threshold=None).spikes.pow(2).mean()
                return torch.stack([layers(frame) for frame in x]).pow(2).mean()

        whole, x = Net(), inputs()
        params = {f"layers.{name}": p for name, p in names.items()}
        with context:
            grads = torch.autograd.grad(whole(x), list(params.values()), create_graph=True)
            stepped = {n: p - 2.0 * g for (n, p), g in zip(params.items(), grads, strict=True)}
            loss = functional_call(whole, stepped, (x.flip(0),))
        return list(torch.autograd.grad(loss, list(params.values())))

    compare(adapted(sparse_mode(backprop_threshold=None), unrolled), adapted(nullcontext(), False))


def windowed_loop(x, weight, recurrent, beta, window):
    class Spike(torch.autograd.Function):
        @staticmethod
        def forward(ctx, u):
            ctx.save_for_backward(u)
            return (u > 0).to(u.dtype)

        @staticmethod
        def backward(ctx, grad):
            (u,) = ctx.saved_tensors
            slope = 1 / (1 + 5 * u.abs()) ** 2
            return grad * slope * (1 if window is None else (u.abs() < window))

    mem, spikes, out = torch.zeros(4, 16, dtype=x.dtype), torch.zeros(4, 16, dtype=x.dtype), []
    for frame in x:
        reset = ((mem - 1) > 0).to(x.dtype)
        mem = beta * mem + frame @ weight.t() + spikes @ recurrent.t() - reset
        spikes = Spike.apply(mem - 1)
        out.append(spikes)
    return torch.stack(out)


@pytest.mark.parametrize("events", [False, True], ids=["dense", "events"])
@pytest.mark.parametrize("window", [None, 0.4], ids=["exact", "window"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_op_in_float64(backend, window, events):
    torch.manual_seed(0)
    x = inputs().double()
    weight = torch.randn(16, 20, dtype=torch.float64).mul(0.4).requires_grad_()
    recurrent = torch.randn(16, 16, dtype=torch.float64).mul(0.2).requires_grad_()
    beta = torch.full((), 0.9, dtype=torch.float64, requires_grad=True)
    of = [weight, recurrent, beta]
    found = []
    for fused in (False, True):
        if fused:
            out = spiking_layer(
                SpikeTrain.from_dense(x) if events else x,
                weight,
                spec=NeuronSpec(),
                params=NeuronParams(mem=beta),
                surrogate=Surrogate("fast_sigmoid", (5.0,)),
                recurrent_weight=recurrent,
                backend=backend,
                backprop_threshold=window,
                min_active=0.0,
            ).spikes
        else:
            out = windowed_loop(x, weight, recurrent, beta, window)
        factors = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
        first = torch.autograd.grad((out * factors).sum(), of, create_graph=True)
        second = torch.autograd.grad(sum(g.pow(2).sum() for g in first), of)
        found.append([*(g.detach() for g in first), *second])
    compare(found[1], found[0], 1e-10)


@pytest.mark.parametrize("fuse", [True, False], ids=["recorded", "stepped"])
def test_what_a_window_did_not_keep_is_an_error_and_not_a_missing_term(fuse):
    """The loss is linear in the spikes, so that no gradient that arrives asks for a graph."""
    torch.manual_seed(0)
    (_, lif1, second, lif2), x = net(lambda: snntorch.Leaky(0.9)), torch.rand(6, 4, 16).requires_grad_()
    with sparse_mode(backprop_threshold=0.01, min_active=0, fuse_time=fuse):
        mem1, mem2, out = torch.zeros(1), torch.zeros(1), []
        for frame in x.unbind(0):
            hidden, mem1 = lif1(frame * 1.5, mem1)
            _, mem2 = lif2(second(hidden), mem2)
            out.append(mem2)
        loss = torch.stack(out).sum()
    (first,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(FusionError, match=r"backprop_threshold=None.*fuse_time=False"):
        first.pow(2).sum().backward()


def test_a_custom_surrogate_is_differentiated_through_its_own_gradient():
    def function(x):
        soft = torch.sigmoid(3 * x)
        return (x > 0).to(x.dtype).sub(soft).detach() + soft

    x = torch.randn(30, dtype=torch.float64, requires_grad=True)
    custom = Surrogate("custom", function=function)
    found = []
    for spike in (function, custom):
        (first,) = torch.autograd.grad(spike(x).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.pow(2).sum(), x))
    compare(found[1], found[0], 1e-12)
