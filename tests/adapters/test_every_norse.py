"""Every thresholded neuron of Norse, fused, against Norse's own step: spikes, states and every gradient."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import BACKENDS, INTERPRETING, SAMPLES, STEPS, on_grid, relative, spikes
from torch import nn

norse = pytest.importorskip("norse.torch")

import snn_sparse_plugin as ssp  # noqa: E402
from snn_sparse_plugin.adapters import adapter_of  # noqa: E402

M, N, T, B = 12, 9, STEPS, SAMPLES
DTYPES = [torch.float32] if INTERPRETING else [torch.float32, torch.float64]
IN_FLOAT64 = (
    "LIFCell",
    "LIFRecurrentCell",
    "LSNNCell",
    "IzhikevichCell",
    "LICell",
)  # of the others only a slow test
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


class Case(NamedTuple):
    """One computation: sizes, what the parameters are multiplied with, and the seed of weights and input."""

    name: str
    window: float | None = None
    dtype: torch.dtype = torch.float32
    sizes: tuple[int, int, int, int] = (T, B, M, N)
    factor: float = 1.0
    seed: int = 1


def learnable(p: Any, case: Case) -> tuple[Any, list[torch.Tensor]]:
    """The parameters of a neuron as leaves, one number per neuron, and those leaves."""
    leaves: list[torch.Tensor] = []
    fields = {}
    for name, value in p._asdict().items():
        if hasattr(value, "_asdict"):
            fields[name], inner = learnable(value, case)
            leaves += inner
        elif isinstance(value, torch.Tensor) and name != "alpha":
            spread = torch.linspace(0.9, 1.1, case.sizes[3], dtype=case.dtype)
            fields[name] = (float(VALUES.get(name, value)) * case.factor * spread).requires_grad_()
            leaves.append(fields[name])
        else:
            fields[name] = value
    return type(p)(**fields), leaves


def build(case: Case) -> tuple[nn.Module, Any]:
    """A neuron with upstream's parameters behind its synapses, and the neuron itself."""
    torch.manual_seed(case.seed)
    name, (_, _, inputs, neurons) = case.name, case.sizes
    cls = getattr(norse, name)
    sizes = (inputs, neurons) if "Recurrent" in name else ()
    module = cls(*sizes, norse.tonic_spiking) if name in IZHIKEVICH else cls(*sizes)
    scale = 60.0 if name in IZHIKEVICH else 12.0
    if "Recurrent" in name:
        with torch.no_grad():
            for weights, size in ((module.input_weights, scale), (module.recurrent_weights, 1.0)):
                weights.copy_((torch.randn(weights.shape) * size / 4 * 256).round() / 256)
        return module.to(case.dtype), module
    layer = on_grid(nn.Linear(inputs, neurons), scale)
    return norse.SequentialState(layer, module).to(case.dtype), module


def per_step(net: nn.Module, x: torch.Tensor, state: Any, sequence: bool) -> tuple[torch.Tensor, Any]:
    if sequence:
        return net(x, state)
    outs = []
    for h in x:
        out, state = net(h, state)
        outs.append(out)
    return torch.stack(outs), state


def flat(state: Any) -> list[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        return [state]
    return [] if state is None else [t for part in state for t in flat(part)]


def as_leaves(state: Any, dtype: torch.dtype) -> Any:
    """The same state with tensors of its own that want gradients."""
    if isinstance(state, torch.Tensor):
        return state.detach().to(dtype, copy=True).requires_grad_()
    if state is None or isinstance(state, list):
        return state and [as_leaves(part, dtype) for part in state]
    return type(state)(*(as_leaves(part, dtype) for part in state))


def run(case: Case, backend: str | None) -> tuple[Any, ...]:
    """Outputs, states and gradients: fused on a backend, or (None) upstream's own steps.

    Both start from the state that upstream has after two other steps, which wants gradients too.
    """
    net, neuron = build(case)
    steps, batch, inputs, _ = case.sizes
    sequence = adapter_of(neuron).takes_sequence(neuron)
    generator = torch.Generator().manual_seed(case.seed)
    with torch.no_grad():
        before = spikes(2, batch, inputs, density=0.3, seed=case.seed + 1).to(case.dtype)
        start = as_leaves(per_step(net, before, None, sequence)[1], case.dtype)
    leaves: list[torch.Tensor] = []
    if case.name not in IZHIKEVICH:  # only now, as upstream fills its own initial states with single numbers
        neuron.p, leaves = learnable(neuron.p, case)
    initial = flat(start)  # now, as Norse's container writes into the list that it is given
    x = spikes(steps, batch, inputs, density=0.3, seed=case.seed).to(case.dtype).requires_grad_()
    options: dict[str, Any] = {"backprop_threshold": case.window, "min_active": 0.0}
    if backend is not None:
        whole = isinstance(net, norse.SequentialState)
        out, _, state = ssp.unroll(net, x, start if whole else [start], backend=backend, **options)
        state = state if whole else state[0]
    else:  # upstream's own steps; with a window each of its thresholds is masked, which has its own tests
        with ssp.sparse_mode(fuse_time=False, **options):
            out, state = per_step(net, x, start, sequence)

    def weighted(y: torch.Tensor) -> torch.Tensor:
        return (y * torch.randn(y.shape, generator=generator, dtype=case.dtype)).sum()

    loss = weighted(out) + sum(weighted(s) for s in flat(state))
    leaves = [x, *leaves, *net.parameters(), *initial]
    return out.detach(), flat(state), torch.autograd.grad(loss, leaves, allow_unused=True)


def compare(case: Case, backend: str) -> torch.Tensor:
    """Check a fused run against upstream's; -> the spikes."""
    expected, actual = run(case, None), run(case, backend)
    assert torch.isfinite(expected[0]).all()
    # only exp() may differ, in its last bit
    exact = not any(word in case.name for word in EXPONENTIAL)
    readout = case.name.startswith("LI") and not case.name.startswith("LIF")
    for a, e in zip([actual[0], *actual[1]], [expected[0], *expected[1]], strict=True):
        assert torch.equal(a, e) if exact else relative(a.detach(), e.detach()) < 1e-6
    assert readout or torch.equal(actual[0], expected[0])
    for a, e in zip(actual[2], expected[2], strict=True):
        if e is None or not e.any():
            assert a is None or not a.any()
        else:
            assert relative(a, e) < (1e-5 if case.dtype == torch.float32 else 1e-11)
    return expected[0]


NAMES = [*FEED_FORWARD, *RECURRENT, *IZHIKEVICH]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [None, 0.3], ids=["exact", "window"])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(
            name,
            dtype,
            marks=pytest.mark.slow if dtype is torch.float64 and name not in IN_FLOAT64 else (),
            id=f"{name}-{dtype}",
        )
        for name in NAMES
        for dtype in DTYPES
    ],
)
def test_fused_equals_upstream(name, window, dtype, backend, counted):
    out = compare(Case(name, window, dtype), backend)
    assert counted[backend, "forward"] == counted[backend, "backward"] == 1  # the whole sequence in one call
    readout = name.startswith("LI") and not name.startswith("LIF")
    assert readout or 0.01 < float(out.mean()) < 0.9


@pytest.mark.skipif(INTERPRETING, reason="the interpreter is slow")
@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(IN_FLOAT64),
    window=st.sampled_from([None, 0.2, 1.0]),
    sizes=st.tuples(st.integers(1, 70), st.integers(1, 4), st.integers(1, 20), st.integers(1, 40)),
    factor=st.floats(0.5, 1.5),
    seed=st.integers(0, 1000),
)
def test_any_shape_and_parameters(name, window, sizes, factor, seed):
    compare(Case(name, window, torch.float64, sizes, factor, seed), "cpu")


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
    net, _ = build(Case("LIFAdExRecurrentCell"))
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
