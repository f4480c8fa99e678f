"""Neurons given by equations on the triton backend, against the reference: interpreter and device alike."""

import pytest
import torch
from layer_cases import TOLERANCE

from snn_sparse_plugin.backends import calls
from snn_sparse_plugin.core.equations import Equations
from snn_sparse_plugin.core.surrogates import Surrogate
from snn_sparse_plugin.ops.spiking_layer import spiking_layer

# an exponential term, adaptation and a refractory counter: two spikes, every kind of operation but log and abs
ADAPTIVE = Equations(
    """
    j = i + x + rec
    u = v + mem * (leak - v + delta * exp((v - threshold) / delta) + j - a)
    i = j + -syn * j
    b = a + adaptation * (coupling * (v - leak) - a)
    z = spike(u - threshold)
    m = spike(rho)
    w = (1 - z) * u + detach(z) * reset
    v = (1 - m) * w + m * v
    s = (1 - m) * z
    rho = (1 - s) * relu(rho - m) + s * 3
    a = b + z * jump
    """,
    ("v", "i", "a", "rho"),
)
# fires on changes; states are exchanged, one is a copy of another
DELTA = Equations(
    """
    u = mem * v + x + rec
    s = spike(abs(u - v) - threshold)
    before = v
    v = u
    """,
    ("before", "v"),
)
SECOND_ORDER = Equations(
    """
    r = above(v - threshold)
    e = mem * exc + x
    h = syn * inh - x
    u = log(2 + mem) * (e + h)
    exc = e - e * r
    inh = h - h * r
    v = u - u * r
    s = spike(v - threshold)
    """,
    ("exc", "inh", "v"),
)
# an excitatory and an inhibitory input, which pull the membrane to values of their own
CONDUCTANCE = Equations(
    """
    e = exc + drive + rec_drive
    i = inh + brake + rec_brake
    v = mem * v + e * (2 - v) - i
    exc = e - mem * e
    inh = i - syn * i
    s = spike(v - threshold)
    v = (1 - s) * v + s * reset
    """,
    ("v", "exc", "inh"),
    inputs=("drive", "brake"),
)
READOUT = Equations("v = v + mem * (leak - v + x)", ("v",))
NEURONS = {
    **{"adaptive": ADAPTIVE, "delta": DELTA, "second-order": SECOND_ORDER},
    **{"two-inputs": CONDUCTANCE, "readout": READOUT},
}
VALUES = {
    **{"mem": 0.5, "syn": 0.25, "leak": 0.125, "threshold": 0.75, "reset": 0.125},
    **{"delta": 0.5, "adaptation": 0.125, "coupling": 0.25, "jump": 0.25},
}


class EquationTests:
    device = "cpu"

    def both(self, equations, dtype, *, recurrent=False, events=True, window=0.3, T=40, B=2, M=8, N=5):
        results = []
        for backend in ("reference", "triton"):
            torch.manual_seed(0)
            make = {"dtype": dtype, "device": self.device}
            x = (torch.rand(T, B, M, **make) < 0.3).to(dtype)
            spread = torch.linspace(0.75, 1.25, N, **make)
            params = {k: (VALUES[k] * spread).requires_grad_() for k in equations.program.params}
            currents = len(equations.inputs) * N
            weight = torch.round(torch.randn(currents, M, **make) * 256).div(256).requires_grad_()
            bias = torch.round(torch.randn(currents, **make) * 32).div(256).requires_grad_()
            state = {k: (torch.randn(B, N, **make) / 4).requires_grad_() for k in equations.states}
            leaves = [weight, bias, *params.values(), *state.values()]
            rec = None
            if recurrent:
                rec = torch.round(torch.randn(currents, N, **make) * 64).div(256).requires_grad_()
                leaves.append(rec)
            given = (x, weight, bias) if events else (x @ weight.t() + bias,)
            out = spiking_layer(
                *given,
                spec=equations,
                params=params,
                surrogate=Surrogate("fast_sigmoid", (5.0,)),
                recurrent_weight=rec,
                state=state,
                return_mem=True,
                backend=backend,
                backprop_threshold=window,
                min_active=0.0,
            )
            loss = (out.spikes * torch.randn(out.spikes.shape, **make)).sum()
            loss = loss + (out.mem * torch.randn(out.mem.shape, **make)).sum()
            loss = loss + sum(
                (v * torch.randn(v.shape, **make)).sum() for k, v in out.state.items() if k != "spikes"
            )
            results.append((out, torch.autograd.grad(loss, leaves, allow_unused=True)))
        return results

    def check(self, equations, dtype=torch.float32, **options):
        calls.clear()
        (expected, expected_grads), (actual, actual_grads) = self.both(equations, dtype, **options)
        assert calls["triton", "forward"] == calls["triton", "backward"] == 1
        tolerance = TOLERANCE[dtype]
        if equations.spiking:
            assert 0.01 < float(expected.spikes.mean()) < 0.9
            assert torch.equal(actual.spikes, expected.spikes)
            assert actual.active_fraction == pytest.approx(expected.active_fraction)
        for label in equations.states:
            torch.testing.assert_close(actual.state[label], expected.state[label], rtol=0, atol=tolerance)
        torch.testing.assert_close(actual.mem, expected.mem, rtol=0, atol=tolerance)
        for a, e in zip(actual_grads, expected_grads, strict=True):
            assert float((a - e).norm()) <= tolerance * float(e.norm()) + 1e-12

    @pytest.mark.parametrize("window", [None, 0.3], ids=["exact", "window"])
    @pytest.mark.parametrize("name", NEURONS)
    def test_every_kind(self, name, window):
        self.check(NEURONS[name], window=window)

    @pytest.mark.parametrize("name", ["adaptive", "delta", "two-inputs"])
    def test_recurrent(self, name):
        self.check(NEURONS[name], recurrent=True)

    def test_from_a_current(self):
        self.check(ADAPTIVE, events=False)

    def test_double_precision(self):
        self.check(ADAPTIVE, torch.float64, recurrent=True)

    @pytest.mark.parametrize(("T", "B", "N"), [(0, 2, 5), (1, 1, 1), (33, 3, 40)])
    def test_shapes(self, T, B, N):
        (expected, expected_grads), (actual, actual_grads) = self.both(DELTA, torch.float64, T=T, B=B, N=N)
        assert torch.equal(actual.spikes, expected.spikes)
        for a, e in zip(actual_grads, expected_grads, strict=True):
            torch.testing.assert_close(torch.zeros_like(e) if a is None else a, e)
