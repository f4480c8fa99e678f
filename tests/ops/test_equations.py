"""Neurons given by equations: what the text may say, and the CPU kernels against the reference."""

from __future__ import annotations

import pickle

import pytest
import torch
from helpers import on_grid, relative, spikes
from hypothesis import given, settings
from hypothesis import strategies as st

from snn_sparse_plugin import ConfigError, InputError, NeuronSpec, UnsupportedError
from snn_sparse_plugin.backends import calls
from snn_sparse_plugin.backends.cpu import CPUBackend
from snn_sparse_plugin.core.dynamics import NeuronParams
from snn_sparse_plugin.core.equations import Equations
from snn_sparse_plugin.core.surrogates import Surrogate
from snn_sparse_plugin.ops import spiking_layer
from snn_sparse_plugin.ops.spiking_layer import prepared

LEAKY = Equations(
    """
    v = beta * v + x - above(v - threshold) * threshold
    s = spike(v - threshold)
    """,
    ("v",),
)
SURROGATE = Surrogate("fast_sigmoid", (5.0,))


def test_equations_of_leaky_are_leaky():
    x, w = spikes(30, 4, 12, p=0.3), on_grid(7, 12).requires_grad_()
    out = spiking_layer(x, w, spec=LEAKY, params={"beta": 0.9, "threshold": 1.0}, surrogate=SURROGATE)
    known = spiking_layer(x, w, spec=NeuronSpec(), params=NeuronParams(0.9), surrogate=SURROGATE)
    assert torch.equal(out.spikes, known.spikes)
    assert known.spikes.any()
    assert torch.equal(out.state["v"], known.state.v)
    g = torch.randn_like(out.spikes)
    (a,), (b,) = torch.autograd.grad(out.spikes, w, g), torch.autograd.grad(known.spikes, w, g)
    assert relative(a, b) < 1e-6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v = beta * v +", "do not parse"),
        ("v += x", "expected an assignment"),
        ("v = x ** 2", "only"),
        ("v = sin(x)", "only"),
        ("v = u\nu = x", "before it is assigned"),
        ("x = v", "cannot be assigned"),
        ("v = x\ns = v", "spike"),
        ("v = x\nw = spike(v)", "assigns s"),
        ("v = x * rec\ns = spike(v)", "right after"),
        ("v = x + rec + rec\ns = spike(v)", "right after"),
        ("v = x + rec\ns = spike(v - x)", "right after"),
        ("v = x + x + rec\ns = spike(v)", "right after"),
        ("v = x\ns = spike(v) * 2", "0 or 1"),
        ("v = x\ns = 1 - v * spike(v)", "0 or 1"),
    ],
)
def test_wrong_text(text, message):
    with pytest.raises(ConfigError, match=message):
        Equations(text, ("v",))


def test_wrong_inputs():
    for inputs in ("x", [], ("x", "x"), ("rec", "y"), ("s",)):
        with pytest.raises(ConfigError, match="inputs must be a tuple of different names"):
            Equations("v = x", ("v",), inputs=inputs)
    with pytest.raises(ConfigError, match="states must be"):
        Equations("v = e + i", ("e",), membrane="e", inputs=("e", "i"))
    for text in ("v = e + rec_e + i", "v = (e + rec_e) * (i + rec_i) + i"):
        with pytest.raises(ConfigError, match="right after the other"):
            Equations(text, ("v",), inputs=("e", "i"))
    # with several inputs "rec" is a name like any other
    assert Equations("v = e + rec + i", ("v",), inputs=("e", "i")).program.params == ("rec",)


TWO = Equations(
    "v = beta * v + (e + rec_e) * (2 - v) - (i + rec_i)\ns = spike(v - 1)\nv = v * (1 - s)",
    ("v",),
    inputs=("e", "i"),
)


def test_two_inputs_are_two_currents():
    """One matrix with the rows of both inputs, or their currents given: the same neurons."""
    torch.manual_seed(0)
    x, w = spikes(40, 3, 12, p=0.3), on_grid(2 * 7, 12)
    current = x @ w.t()
    outs = [
        spiking_layer(*given, spec=TWO, params={"beta": 0.5}, return_mem=True, backend=backend)
        for backend in ("cpu", "reference")
        for given in ((x, w), (current,), (current.unflatten(2, (2, 7)),))
    ]
    assert 0.05 < outs[0].spikes.mean() < 0.9
    assert outs[0].spikes.shape == (40, 3, 7)
    v = torch.zeros(3, 7)
    for t, (e, i) in enumerate(zip(*current.chunk(2, 2), strict=True)):
        v = 0.5 * v + e * (2 - v) - i
        s = (v > 1).float()
        v = v * (1 - s)
        for out in outs:
            assert torch.equal(out.spikes[t], s)
            assert torch.equal(out.mem[t], v)


def test_wrong_sizes_of_several_inputs():
    x = spikes(3, 2, 9)
    with pytest.raises(InputError, match="current of 2·N features"):
        spiking_layer(x, spec=TWO, params={"beta": 0.5})
    with pytest.raises(InputError, match="weight of 2·N features"):
        spiking_layer(x, torch.zeros(5, 9), spec=TWO, params={"beta": 0.5})
    with pytest.raises(InputError, match=r"recurrent_weight has shape \(4, 4\), expected \(8, 4\)"):
        spiking_layer(
            x, torch.zeros(8, 9), spec=TWO, params={"beta": 0.5}, recurrent_weight=torch.zeros(4, 4)
        )
    with pytest.raises(InputError, match="never read a recurrent current"):
        spiking_layer(
            x, spec=LEAKY, params={"beta": 0.9, "threshold": 1.0}, recurrent_weight=torch.zeros(9, 9)
        )


def test_wrong_states():
    with pytest.raises(ConfigError, match="none of the states"):
        Equations("u = x", ("u",))
    for states in ("v", ["v"], ("v", "v"), ("v", "x"), ("v", "exp"), ()):
        with pytest.raises(ConfigError, match="tuple of different names"):
            Equations("v = x", states)


def test_what_nothing_reads_is_dropped():
    lean = Equations("v = x", ("v",))
    assert Equations("r = above(v - p)\nu = exp(v)\nv = x", ("v",)).program.ops == lean.program.ops == ()


def test_wrong_calls():
    x = spikes(3, 2, 4)
    with pytest.raises(InputError, match=r"take params \['beta', 'threshold'\], got \['beta'\]"):
        spiking_layer(x, spec=LEAKY, params={"beta": 0.9})
    with pytest.raises(InputError, match="got NeuronParams"):
        spiking_layer(x, spec=LEAKY, params=NeuronParams(0.9))
    with pytest.raises(InputError, match="no state"):
        spiking_layer(x, spec=LEAKY, params={"beta": 0.9, "threshold": 1.0}, state={"u": torch.zeros(2, 4)})


def test_a_backend_that_cannot_says_so(monkeypatch):
    monkeypatch.setattr(CPUBackend, "equations", False)
    monkeypatch.setattr(prepared, "_kept", {})
    x, params = spikes(3, 2, 4), {"beta": 0.9, "threshold": 1.0}
    with pytest.raises(UnsupportedError, match="given by equations"):
        spiking_layer(x, spec=LEAKY, params=params, backend="cpu")
    calls.clear()
    spiking_layer(x, spec=LEAKY, params=params)  # chosen automatically: the next one that can
    assert calls["reference", "forward"] == 1


def test_static():
    again = pickle.loads(pickle.dumps(LEAKY))
    assert again == LEAKY
    assert hash(again) == hash(LEAKY)
    assert again.program == LEAKY.program


def test_states_advance_at_once():
    swap = Equations("w = u\nu = v + x\nv = w", ("u", "v"))
    x = torch.zeros(1, 1, 1)
    out = spiking_layer(x, spec=swap, params={}, state={"u": torch.ones(1, 1), "v": 2 * torch.ones(1, 1)})
    assert (out.state["u"].item(), out.state["v"].item()) == (2.0, 1.0)
    assert out.spikes.item() == 1.0  # a readout returns its membrane


@pytest.mark.parametrize("shape", [(0, 2, 3), (3, 0, 3), (3, 2, 0)])
def test_empty(shape):
    x = torch.zeros(*shape, requires_grad=True)
    out = spiking_layer(x, spec=LEAKY, params={"beta": 0.9, "threshold": 1.0})
    assert out.spikes.shape == shape
    out.spikes.sum().backward()
    assert x.grad is not None


def test_overflow_is_told():
    grows = Equations("v = v * exp(v) + x\ns = spike(v - 1)", ("v",))
    with pytest.raises(InputError, match="NaN or infinite"):
        spiking_layer(torch.full((30, 1, 4), 5.0), spec=grows, params={})


REFRACTORY = Equations(
    """
    u = beta * v + x
    z = spike(u - threshold)
    m = spike(rho)
    s = (1 - m) * z
    v = (1 - m) * (u - z * threshold) + m * v
    rho = (1 - s) * relu(rho - m) + s * 2
    """,
    ("v", "rho"),
)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("events", [False, True])
def test_spikes_that_enter_another_layer(events, backend):
    """The gradient of an output that is more than one spike is needed wherever any of them is in its window."""

    def run(backend, events):
        torch.manual_seed(3)
        x = spikes(30, 3, 12, p=0.3).double()
        first = torch.randn(20, 12, dtype=torch.float64).requires_grad_()
        second = torch.randn(5, 20, dtype=torch.float64).requires_grad_()
        options = {"backprop_threshold": 0.4, "min_active": 0.0, "surrogate": SURROGATE, "backend": backend}
        params = {"beta": 0.9, "threshold": 1.0}
        hidden = spiking_layer(x, first, spec=REFRACTORY, params=params, events=events, **options)
        out = spiking_layer(hidden.spikes, second, params=NeuronParams(0.9), **options)
        return torch.autograd.grad(out.spikes.square().sum(), (first, second))

    for a, e in zip(run(backend, events), run("reference", False), strict=True):
        assert e.any()
        assert relative(a, e) < 1e-10


ONE = Equations("v = beta * v + x + rec\ns = spike(v - 1)\nv = v - detach(s)", ("v",))


@pytest.mark.parametrize(("equations", "B", "N"), [(ONE, 13, 33), (ONE, 5, 300), (TWO, 13, 33)])
def test_many_blocks_and_threads(equations, B, N):
    """Rows of nu are delivered in blocks, whose borders fall anywhere in the samples of each thread."""
    currents = len(equations.inputs) * N
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        results = []
        for backend in ("reference", "cpu"):
            torch.manual_seed(0)
            x = spikes(150, B, 20, p=0.2).double()
            w = torch.randn(currents, 20, dtype=torch.float64).div(len(equations.inputs)).requires_grad_()
            rec = (torch.randn(currents, N, dtype=torch.float64) / N).requires_grad_()
            out = spiking_layer(
                x,
                w,
                spec=equations,
                params={"beta": 0.9},
                surrogate=SURROGATE,
                recurrent_weight=rec,
                backend=backend,
            )
            g = torch.randn(out.spikes.shape, dtype=torch.float64)
            results.append((out.spikes, *torch.autograd.grad(out.spikes, (w, rec), g)))
    finally:
        torch.set_num_threads(threads)
    (expected, *expected_grads), (actual, *actual_grads) = results
    assert torch.equal(actual, expected)
    for a, e in zip(actual_grads, expected_grads, strict=True):
        assert relative(a, e) < 1e-10


# Random neurons: two states and two parameters under random expressions of everything the text may say. What enters
# a state is squashed by y / (1 + abs(y)), so that nothing explodes.
LEAVES = st.sampled_from(["v", "w", "p", "q", "0.5", "2", "y", "s"])


def combined(inner):
    return st.one_of(
        st.tuples(st.sampled_from("+-*"), inner, inner).map(lambda t: f"({t[1]} {t[0]} {t[2]})"),
        st.tuples(inner, inner).map(lambda t: f"({t[0]} / (1 + abs({t[1]})))"),
        inner.map(lambda e: f"exp(-abs({e}))"),
        inner.map(lambda e: f"log(1 + abs({e}))"),
        inner.map(lambda e: f"relu({e})"),
        inner.map(lambda e: f"detach({e})"),
        inner.map(lambda e: f"above({e})"),
        inner.map(lambda e: f"-{e}"),
        inner.map(lambda e: f"spike({e})"),
    )


EXPRESSIONS = st.recursive(LEAVES, combined, max_leaves=8)


@settings(max_examples=60, deadline=None)
@given(
    first=EXPRESSIONS,
    second=EXPRESSIONS,
    window=st.sampled_from([None, 0.3]),
    recurrent=st.booleans(),
    inputs=st.sampled_from([("x",), ("x", "z")]),
    seed=st.integers(0, 1000),
)
def test_random_neurons(first, second, window, recurrent, inputs, seed):
    text = f"""
    y = p * v + {"x + rec" if len(inputs) == 1 else "(x + rec_x) * (1 + w) + relu(z + rec_z)"} - w
    s = spike(y - q)
    a = {first}
    b = {second}
    v = a / (1 + abs(a)) + y
    v = v / (1 + abs(v)) * 2
    w = b / (1 + abs(b)) * (1 - s)
    """
    equations = Equations(text, ("v", "w"), inputs=inputs)
    torch.manual_seed(seed)
    T, B, M, N = 37, 2, 6, 5
    x = (spikes(T, B, M, p=0.4)).double()
    leaves = {
        "weight": torch.randn(len(inputs) * N, M, dtype=torch.float64),
        "p": torch.rand(N, dtype=torch.float64),
        "q": torch.rand(N, dtype=torch.float64),
        "v": torch.randn(B, N, dtype=torch.float64),
        "w": torch.randn(B, N, dtype=torch.float64),
    }
    if recurrent:
        leaves["rec"] = torch.randn(len(inputs) * N, N, dtype=torch.float64) / 3
    known = equations.program.params
    results = []
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(3, T, B, N, generator=generator, dtype=torch.float64)
    for backend in ("reference", "cpu"):
        own = {name: value.clone().requires_grad_() for name, value in leaves.items()}
        out = spiking_layer(
            x,
            own["weight"],
            spec=equations,
            params={name: own[name] for name in known},
            surrogate=SURROGATE,
            recurrent_weight=own.get("rec"),
            state={"v": own["v"], "w": own["w"]},
            return_mem=True,
            backend=backend,
            backprop_threshold=window,
            min_active=0.0,
        )
        loss = (out.spikes * g[0]).sum() + (out.mem * g[1]).sum() + (out.state["w"] * g[2, 0]).sum()
        results.append((out, torch.autograd.grad(loss, list(own.values()), allow_unused=True)))
    (expected, expected_grads), (actual, actual_grads) = results
    assert torch.equal(actual.spikes, expected.spikes)
    assert relative(actual.mem, expected.mem) < 1e-12
    for a, e in zip(actual_grads, expected_grads, strict=True):
        assert (a is None) == (e is None)
        if e is not None:
            # chains of thousands of factors: compared with the size of the largest gradient
            assert float((a - e).abs().max()) <= 1e-9 * max(1.0, float(e.abs().max()))
