"""Surrogates: areas, windows, masked spikes."""

import pickle

import pytest
import torch
from helpers import relative

from snn_sparse_plugin import Surrogate
from snn_sparse_plugin.core import host, tally
from snn_sparse_plugin.core.errors import FusionError
from snn_sparse_plugin.core.surrogates import masked_spike

WINDOWED = [
    ("fast_sigmoid", (100.0,)),
    ("fast_sigmoid", (25.0,)),
    ("atan", (2.0,)),
    ("sigmoid", (25.0,)),
    ("triangle", (0.3,)),
    ("tanh", (3.0,)),
    ("circ", (0.5,)),
    ("erfc", (2.0,)),
    ("spike_rate_escape", (1.0, 25.0)),
    ("sparse_fast_sigmoid", (25.0, 0.1)),
]


@pytest.mark.parametrize(("kind", "params"), WINDOWED)
def test_auto_cuts_five_percent_of_the_area(kind, params):
    surrogate = Surrogate(kind, params)
    window = surrogate.auto_threshold()
    # the tails go as far as 1/x^2: integrate in log spacing, far out
    x = torch.logspace(-7, 7, 400_001, dtype=torch.float64)
    area = sum(surrogate.grad(s * x) for s in (1, -1))
    whole = torch.trapezoid(area, x)
    outside = torch.trapezoid(area * (x > window), x)
    assert outside / whole == pytest.approx(0.05, rel=2e-3)


def test_the_published_window():
    assert Surrogate("fast_sigmoid", (100.0,)).auto_threshold() == 0.19


@pytest.mark.parametrize("kind", ["zero", "straight_through", "heaviside"])
def test_surrogates_without_a_finite_area_stay_exact(kind):
    assert Surrogate(kind).auto_threshold() is None
    assert Surrogate(kind).resolve(0.2) == 0.2


def test_the_window_of_an_unknown_function_is_measured():
    known = Surrogate("sigmoid", (5.0,))
    found = Surrogate("custom", function=known).auto_threshold()
    assert found == pytest.approx(known.auto_threshold(), rel=0.02)
    assert Surrogate("custom", function=Surrogate("straight_through")).auto_threshold() is None


@pytest.mark.parametrize(("kind", "params"), [*WINDOWED, ("triangular", (1.0,)), ("heaviside", ())])
def test_the_spike_function_has_the_gradient_of_the_formula(kind, params):
    surrogate = Surrogate(kind, params)
    x = torch.randn(1000, dtype=torch.float64, requires_grad=True)
    spikes = surrogate(x)
    assert torch.equal(spikes, (x > 0).double())
    upstream = torch.randn_like(x)
    (grad,) = torch.autograd.grad(spikes, x, upstream)
    assert torch.equal(grad, upstream * surrogate.grad(x.detach()))
    assert pickle.loads(pickle.dumps(surrogate)) == surrogate


def test_sigmoid_does_not_overflow_far_below_threshold():
    grad = Surrogate("sigmoid", (25.0,)).grad(torch.tensor([-100.0, -4.0, 4.0, 100.0]))
    assert torch.isfinite(grad).all()
    assert grad[1] == grad[2]


def test_masked_spike_keeps_only_active_elements():
    surrogate = Surrogate("fast_sigmoid", (10.0,))
    x = torch.randn(40, 50, requires_grad=True)
    upstream = torch.randn_like(x)
    spikes = masked_spike(x, surrogate, surrogate, 0.3, 0.01)
    (grad,) = torch.autograd.grad(spikes, x, upstream)
    near = x.detach().abs() < 0.3
    assert torch.equal(spikes, (x > 0).float())
    assert relative(grad, upstream * surrogate.grad(x.detach()) * near) < 1e-6
    assert not grad[~near].any()


def test_masked_spike_runs_exact_where_too_few_are_active():
    surrogate = Surrogate("fast_sigmoid", (10.0,))
    x = (torch.rand(40, 50) - 5).requires_grad_()
    for min_active, silent in ((0.01, False), (0.0, True)):
        (grad,) = torch.autograd.grad(masked_spike(x, surrogate, surrogate, 0.3, min_active).sum(), x)
        assert (grad == 0).all().item() == silent


def test_a_spike_function_whose_slope_differs_by_neuron():
    slopes = torch.linspace(1, 50, 20)

    class PerNeuron(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return (x > 0).float()

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            return grad / (slopes * x.abs() + 1) ** 2

    x = torch.randn(7, 20, requires_grad=True)
    surrogate = Surrogate("custom", function=PerNeuron.apply)
    (grad,) = torch.autograd.grad(masked_spike(x, PerNeuron.apply, surrogate, 0.5, 0.01).sum(), x)
    near = x.detach().abs() < 0.5
    assert torch.allclose(grad, near / (slopes * x.detach().abs() + 1) ** 2)


def test_a_second_derivative_of_the_masked_gradient_is_refused():
    surrogate = Surrogate("fast_sigmoid", (10.0,))
    x = torch.randn(7, 20, requires_grad=True)
    (grad,) = torch.autograd.grad(
        masked_spike(x, surrogate, surrogate, 0.5, 0.01).sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="not have been used in the graph"):
        torch.autograd.grad(grad.sum(), x, retain_graph=True)
    with pytest.raises(FusionError, match="backprop_threshold=None"):
        grad.pow(2).sum().backward()


@pytest.mark.parametrize("min_active", [0, 0.3, 1])
def test_a_device_masks_the_same_elements_and_counts_the_guard_later(min_active, monkeypatch):
    surrogate = Surrogate("fast_sigmoid", (25.0,))
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    upstream = torch.arange(40.0).view(8, 5)
    found = []
    for hosts in (frozenset({"cpu"}), frozenset()):
        monkeypatch.setattr(host, "HOSTS", hosts)
        record = tally.Record("Tested")
        with tally.running(record):
            spikes = masked_spike(x, surrogate, surrogate, 0.3, min_active)
        (grad,) = torch.autograd.grad(spikes, x, upstream)
        tally.fold()
        found.append((spikes.detach(), grad, record.calls.get("guard", 0)))
    for ours, expected in zip(*found, strict=True):
        assert torch.equal(torch.as_tensor(ours), torch.as_tensor(expected))
    assert found[0][2] == (min_active == 1)


def test_a_number_of_a_device_is_read_again_when_it_changed(monkeypatch):
    monkeypatch.setattr(host, "HOSTS", frozenset())
    reads = []

    def read(x):
        reads.append(x)
        return float(x)

    x = torch.tensor(2.0)
    assert [host.known(x, read), host.known(x, read)] == [2, 2]
    x.add_(1)
    assert [host.known(x, read), host.known(x, read)] == [3, 3]
    assert len(reads) == 2
    assert host.number(x) == 3
    assert host.number(0.5) == 0.5
