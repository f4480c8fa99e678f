"""Every thresholded neuron of Norse, fused, against Norse's own step: spikes, states and every gradient."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from oracle import BACKENDS, INTERPRETING, SAMPLES, STEPS, on_grid, relative, spikes
from torch import nn

norse = pytest.importorskip("norse.torch")

import snn_sparse_plugin as ssp  # noqa: E402
from snn_sparse_plugin.adapters import adapter_of  # noqa: E402

M, N, T, B = 12, 9, STEPS, SAMPLES
DTYPES = [torch.float32] if INTERPRETING else [torch.float32, torch.float64]
# rows of the upstream library that have a fused form, by what they are built from
FEED_FORWARD = (
    *("LIF", "LIFCell", "LIFEx", "LIFExCell", "LIFAdEx", "LIFAdExCell", "LIFBoxCell", "IAF", "IAFCell"),
    *("LIFRefracCell", "LIFAdExRefracCell", "LSNN", "LSNNCell", "LI", "LICell", "LIBoxCell"),
)
RECURRENT = (
    *("LIFRecurrent", "LIFRecurrentCell", "LIFExRecurrent", "LIFExRecurrentCell", "LIFAdExRecurrent"),
    *("LIFAdExRecurrentCell", "LIFRefracRecurrent", "LIFRefracRecurrentCell", "LIFAdExRefracRecurrent"),
    *("LIFAdExRefracRecurrentCell", "LSNNRecurrent", "LSNNRecurrentCell"),
)
IZHIKEVICH = ("Izhikevich", "IzhikevichCell", "IzhikevichRecurrent", "IzhikevichRecurrentCell")
# exp() of numba and of torch differ in the last bit; the others run the same float operations in the same order
EXPONENTIAL = ("Ex",)
VALUES = {
    "v_th": 0.4,
    "v_reset": 0.05,
    "v_leak": 0.02,
    "rho_reset": 3.0,
    "tau_adapt_inv": 50.0,
    "tau_ada_inv": 50.0,
}


def learnable(p: Any, dtype: torch.dtype, single: tuple[str, ...]) -> tuple[Any, list[torch.Tensor]]:
    """The parameters of a neuron as leaves, one number per neuron, and those leaves."""
    leaves: list[torch.Tensor] = []
    fields = {}
    for name, value in p._asdict().items():
        if hasattr(value, "_asdict"):
            fields[name], inner = learnable(value, dtype, single)
            leaves += inner
        elif isinstance(value, torch.Tensor) and name != "alpha":
            spread = torch.linspace(0.9, 1.1, 1 if name in single else N, dtype=dtype).squeeze()
            fields[name] = (float(VALUES.get(name, value)) * spread).requires_grad_()
            leaves.append(fields[name])
        else:
            fields[name] = value
    return type(p)(**fields), leaves


def build(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, list[torch.Tensor]]:
    """A neuron behind its synapses, and the leaves of its parameters."""
    torch.manual_seed(1)
    cls = getattr(norse, name)
    if name in IZHIKEVICH:
        sizes = (M, N) if "Recurrent" in name else ()
        module, leaves = cls(*sizes, norse.tonic_spiking), []
    else:
        sizes = (M, N) if name in RECURRENT else ()
        module = cls(*sizes)
        # upstream fills initial states with these, which only a single number can do
        single = ("v_leak", "v_th") if name.startswith("LSNN") else ("v_leak",)
        module.p, leaves = learnable(module.p, dtype, single)
    scale = 60.0 if name in IZHIKEVICH else 12.0
    if "Recurrent" in name:
        with torch.no_grad():
            for weights, size in ((module.input_weights, scale), (module.recurrent_weights, 1.0)):
                weights.copy_((torch.randn(weights.shape) * size / 4 * 256).round() / 256)
        return module.to(dtype), leaves
    layer = on_grid(nn.Linear(M, N), scale)
    return norse.SequentialState(layer, module).to(dtype), leaves


def per_step(net: nn.Module, x: torch.Tensor, sequence: bool) -> tuple[torch.Tensor, Any]:
    if sequence:
        return net(x)
    outs, state = [], None
    for h in x:
        out, state = net(h, state)
        outs.append(out)
    return torch.stack(outs), state


def flat(state: Any) -> list[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        return [state]
    return [] if state is None else [t for part in state for t in flat(part)]


def run(name: str, window: float | None, backend: str | None, dtype: torch.dtype) -> tuple[Any, ...]:
    """Outputs, states and gradients: fused on a backend, or (None) upstream's own steps."""
    net, leaves = build(name, dtype)
    leaves = leaves + list(net.parameters())
    neuron = net[1] if isinstance(net, norse.SequentialState) else net
    sequence = adapter_of(neuron).takes_sequence(neuron)
    x = spikes(T, B, M, density=0.3).to(dtype)
    options: dict[str, Any] = {"backprop_threshold": window, "min_active": 0.0}
    if backend is not None:
        out, _, state = ssp.unroll(net, x, backend=backend, **options)
        state = state if isinstance(net, norse.SequentialState) else state[0]
    else:  # upstream's own steps; with a window each of its thresholds is masked, which has its own tests
        with ssp.sparse_mode(fuse_time=False, **options):
            out, state = per_step(net, x, sequence)
    generator = torch.Generator().manual_seed(5)
    loss = (out * torch.randn(out.shape, generator=generator, dtype=dtype)).sum()
    loss = loss + sum((s * torch.randn(s.shape, generator=generator, dtype=dtype)).sum() for s in flat(state))
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    return out.detach(), flat(state), grads


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 0.3], ids=["exact", "window"])
@pytest.mark.parametrize("name", [*FEED_FORWARD, *RECURRENT, *IZHIKEVICH])
def test_fused_equals_upstream(name, window, dtype, backend, counted):
    expected = run(name, window, None, dtype)
    assert not counted
    actual = run(name, window, backend, dtype)
    assert counted[backend, "forward"] == 1  # the whole sequence in one call
    assert counted[backend, "backward"] == 1
    assert torch.isfinite(expected[0]).all()
    readout = name.startswith("LI") and not name.startswith("LIF")
    assert readout or 0.01 < float(expected[0].mean()) < 0.9
    if readout:
        assert relative(actual[0], expected[0]) < 1e-6
    else:
        assert torch.equal(actual[0], expected[0])
    for a, e in zip(actual[1], expected[1], strict=True):
        assert relative(a.detach(), e.detach()) < 1e-6
    for a, e in zip(actual[2], expected[2], strict=True):
        if e is None:
            assert a is None or not a.any()
        else:
            # in float64 Norse's initial states stay float32, so that its first step is rounded to that
            assert relative(a, e) < (1e-5 if dtype == torch.float32 else 1e-6)


def test_nothing_is_left_out():
    """A neuron class that a new version of Norse brings must be put into one of the lists above."""
    fused, other = {*FEED_FORWARD, *RECURRENT, *IZHIKEVICH}, set()
    for name in dir(norse):
        cls = getattr(norse, name)
        if isinstance(cls, type) and issubclass(cls, nn.Module) and hasattr(cls, "initial_state"):
            other.add(name)
    assert fused - other == set()
    assert other - fused == {"LIFMCRecurrentCell", "LIFMCRefracRecurrentCell"}


def test_a_copy_runs_fused_too(counted):
    net, _ = build("LIFAdExRecurrentCell")
    ssp.unroll(copy.deepcopy(net), spikes(5, B, M))
    assert counted["cpu", "forward"] == 1


def test_a_patched_class_is_left_alone(monkeypatch, counted):
    cell = norse.LSNNCell()
    owner = next(cls for cls in type(cell).__mro__ if "forward" in vars(cls))
    monkeypatch.setattr(owner, "forward", lambda self, input_tensor, state=None: (input_tensor, state))
    assert "forward() was patched by" in adapter_of(cell).neuron(cell)
    x = torch.rand(4, 2, 3)
    assert torch.equal(ssp.unroll(cell, x).spikes, x)
    assert not counted


def test_the_spikes_of_a_disabled_surrogate_stay_out_of_the_graph():
    cell = norse.LSNNRecurrentCell(M, N, p=norse.LSNNParameters(method="heaviside"))
    _, _, (state,) = ssp.unroll(cell, spikes(T, B, M))
    assert not state.z.requires_grad


def test_a_sequence_that_is_stepped_records_no_membrane():
    out = ssp.unroll(norse.LIF(), spikes(T, B, M), fuse_time=False)
    assert out.mem is None
