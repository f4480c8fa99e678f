"""CPU: the backward of neurons that share one decay: against the reference, and against the kernel that sweeps."""

import numpy as np
import pytest
import torch
from helpers import relative, spikes

from snn_sparse_plugin import NeuronParams, NeuronSpec, SpikeTrain, Surrogate
from snn_sparse_plugin.backends.cpu import backward_arrays, layout, spiking_layer_backward, way
from snn_sparse_plugin.core.dynamics import NeuronState
from snn_sparse_plugin.ops import spiking_layer


@pytest.fixture
def forced(monkeypatch):
    """However many entries are active, and events come in."""
    monkeypatch.setattr(way, "_adds_less", lambda *_: True)


OPTIONS = {"surrogate": Surrogate("fast_sigmoid", (25.0,)), "backprop_threshold": 0.2, "min_active": 0}


def gradients(
    backend,
    decay,
    T,
    sizes,
    *,
    dtype=torch.float64,
    density=0.1,
    grade=False,
    dense=False,
    whole=True,
    bias=True,
):
    """Of the weights, biases and initial states of two layers, of which the second has the fewer active entries."""
    torch.manual_seed(1)
    B, (M, H, N) = 5, sizes
    x = spikes(T, B, M, p=density).to(dtype)
    if grade:
        x *= torch.randn(T, B, M, dtype=dtype)
    train = SpikeTrain.from_dense(x)
    leaves = [torch.randn(H, M, dtype=dtype) * (2 / (density * M)) ** 0.5]
    leaves.append(torch.randn(N, H, dtype=dtype) * (3 / H) ** 0.5)
    leaves += [torch.randn(n, dtype=dtype) * 0.1 for n in (H, N)]
    leaves += [
        torch.randn(B, n, dtype=dtype) + 1 for n in (H, N)
    ]  # some near the threshold from the first step
    for leaf in leaves:
        leaf.requires_grad_()
    up, end = torch.randn(T, B, N, dtype=dtype), torch.randn(B, N, dtype=dtype)
    given = {"params": NeuronParams(decay), "backend": backend, **OPTIONS}
    first = spiking_layer(
        train, leaves[0], leaves[2] if bias else None, state=NeuronState(leaves[4]), events=True, **given
    )
    second = spiking_layer(
        first.spikes, leaves[1], leaves[3] if bias else None, state=NeuronState(leaves[5]), **given
    )
    loss = (second.spikes * up).sum() + (second.state.v * end).sum() * whole
    if dense:  # the spikes of the first layer are looked at by others too
        loss = loss + (first.spikes.to_dense() * torch.randn(T, B, H, dtype=dtype)).sum()
    used = leaves if bias else leaves[:2] + leaves[4:]
    found = torch.autograd.grad(loss, used)
    return [*found, torch.tensor(second.active_fraction)]


@pytest.mark.parametrize("decay", [0.0, 0.03, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("T", [1, 2, 150])
def test_every_decay(decay, T, counted, forced):
    """Powers of small decays leave the range of floats many times within a sample."""
    reference = gradients("reference", decay, T, (30, 20, 11))
    counted.clear()
    found = gradients("cpu", decay, T, (30, 20, 11))
    assert counted["cpu", "backward:impulses"] == 2
    assert reference[0].norm() > 0
    assert reference[1].norm() > 0
    for a, b in zip(found, reference, strict=True):
        assert relative(a, b) < 1e-12


@pytest.mark.parametrize("width", [1, 15, 17, 40, 100, 130, 250])
@pytest.mark.parametrize("density", [0.02, 0.5])
def test_every_width_of_rows(width, density, counted, forced):
    """Rows of 1 to 16 vectors; few and many active entries of the input a step."""
    reference = gradients("reference", 0.9, 40, (width, width, 10), density=density)
    counted.clear()
    found = gradients("cpu", 0.9, 40, (width, width, 10), density=density)
    assert counted["cpu", "backward:impulses"] == 2
    for a, b in zip(found, reference, strict=True):
        assert relative(a, b) < 1e-12


@pytest.mark.parametrize(
    "options",
    [{"grade": True}, {"dense": True}, {"whole": False}, {"bias": False}],
    ids=lambda options: next(iter(options)),
)
def test_every_way_in_and_out(options, counted, forced):
    reference = gradients("reference", 0.9, 60, (40, 30, 20), **options)
    counted.clear()
    found = gradients("cpu", 0.9, 60, (40, 30, 20), **options)
    assert counted["cpu", "backward:impulses"] == 2
    for a, b in zip(found, reference, strict=True):
        assert relative(a, b) < 1e-12


def test_what_stood_in_fresh_memory_is_nothing(counted, monkeypatch, forced):
    wanted = gradients("cpu", 0.9, 60, (40, 30, 20))
    fresh = layout.aligned
    for module in (spiking_layer_backward, backward_arrays):
        monkeypatch.setattr(module, "aligned", lambda *size: np.full_like(fresh(*size), float("nan")))
    found = gradients("cpu", 0.9, 60, (40, 30, 20))
    assert counted["cpu", "backward:impulses"] == 4
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float64, 1e-13), (torch.float32, 1e-6)], ids=["f64", "f32"]
)
@pytest.mark.parametrize("decay", [0.3, 0.9, 0.99])
def test_the_choice_changes_roundings_only(decay, dtype, limit, counted, monkeypatch, forced):
    found = gradients("cpu", decay, 200, (60, 40, 30), dtype=dtype)
    assert counted["cpu", "backward:impulses"] == 2
    counted.clear()
    monkeypatch.setattr(way, "_are_impulses", lambda call: False)
    swept = gradients("cpu", decay, 200, (60, 40, 30), dtype=dtype)
    assert counted["cpu", "backward:list"] == 2
    assert counted["cpu", "backward:impulses"] == 0
    for a, b in zip(found, swept, strict=True):
        assert relative(a, b) < limit


def test_results_do_not_depend_on_timing(forced):
    found = [gradients("cpu", 0.9, 100, (50, 40, 30), dtype=torch.float32) for _ in range(5)]
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize(
    "given",
    [
        {"params": NeuronParams(torch.tensor([0.9, 0.8, 0.9]))},
        {"params": NeuronParams(0.9, syn=0.5), "spec": NeuronSpec(synapse=True)},
        {"params": NeuronParams(0.9), "spec": NeuronSpec(reset="zero")},
    ],
    ids=["a decay each", "synapse", "reset to zero"],
)
def test_other_neurons_go_another_way(given, counted, forced):
    x = SpikeTrain.from_dense(spikes(30, 4, 20))
    weight = (torch.randn(3, 20) * 0.5).requires_grad_()
    upstream, found = torch.randn(30, 4, 3), []
    for backend in ("cpu", "reference"):
        out = spiking_layer(x, weight, backend=backend, **given, **OPTIONS)
        found.append(torch.autograd.grad((out.spikes * upstream).sum(), weight)[0])
    assert counted["cpu", "backward:impulses"] == 0
    assert relative(*found) < 1e-5


@pytest.mark.parametrize(("bias", "taken"), [(0.1, 1), (0.5, 0)])
def test_dense_activity_is_swept(bias, taken, counted):
    """Where more entries are active here than in the input."""
    train = SpikeTrain.from_dense(spikes(50, 4, 40, p=0.005))
    given = {"params": NeuronParams(0.5), **OPTIONS}
    quiet = spiking_layer(train, torch.rand(40, 40).requires_grad_(), events=True, **given).spikes
    assert quiet.active is not None
    weight = torch.zeros(30, 40, requires_grad=True)
    out = spiking_layer(
        quiet, weight, torch.full((30,), bias), **given
    )  # 0.5: its membrane comes to rest at 1
    counted.clear()
    torch.autograd.grad(out.spikes.sum(), weight)
    assert counted["cpu", "backward:impulses"] == taken


@pytest.mark.parametrize(("events", "learns", "taken"), [(5, True, 1), (20, True, 0), (20, False, 1)])
def test_many_events_are_added_by_their_columns(events, learns, taken, counted):
    """Gradients of weights of many events a step are cheaper where the adjoint is swept."""
    train = SpikeTrain.from_dense(spikes(50, 4, 200, p=events / 200))
    weight, bias = (torch.randn(30, 200) * 0.2).requires_grad_(learns), torch.zeros(30, requires_grad=True)
    given, upstream, found = {"params": NeuronParams(0.9), **OPTIONS}, torch.randn(50, 4, 30), []
    for backend in ("cpu", "reference"):
        out = spiking_layer(train, weight, bias, backend=backend, **given)
        found.append(torch.autograd.grad((out.spikes * upstream).sum(), weight if learns else bias)[0])
    assert counted["cpu", "backward:impulses"] == taken
    assert relative(*found) < 1e-5
