"""Every thresholded neuron of snnTorch that has a fused form, against its own step: spikes, states, gradients.

The options of Leaky, Synaptic, RLeaky and RSynaptic are crossed in ``test_unroll.py``; here are the other classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import BACKENDS, SAMPLES, STEPS, on_grid, relative, spikes
from torch import nn

snntorch = pytest.importorskip("snntorch")
from snntorch import surrogate  # noqa: E402

import snn_sparse_plugin as ssp  # noqa: E402
from snn_sparse_plugin import unroll  # noqa: E402
from snn_sparse_plugin.adapters import adapter_of  # noqa: E402

M, N, T, B = 12, 9, STEPS, SAMPLES


@pytest.fixture(autouse=True)
def _fresh():
    snntorch.SpikingNeuron.instances.clear()  # one DeltaLeaky alive breaks utils.reset for everyone


def decays(low: float, high: float) -> torch.Tensor:
    return torch.linspace(low, high, N)


THRESHOLD = {"threshold": torch.linspace(0.9, 1.1, N), "learn_threshold": True}
HIDDEN: dict[str, Any] = {"init_hidden": True, "output": True}
STEPPED: dict[str, Callable[..., nn.Module]] = {
    **{
        f"Alpha-{reset}": lambda reset=reset, **k: snntorch.Alpha(
            decays(0.8, 0.9),
            decays(0.5, 0.7),
            learn_beta=True,
            reset_mechanism=reset,
            **THRESHOLD,
            **HIDDEN,
            **k,
        )
        for reset in ("zero", "subtract", "none")
    },
    **{
        f"Lapicque-{reset}": lambda reset=reset, **k: snntorch.Lapicque(
            R=2.0, C=4.0, time_step=0.5, reset_mechanism=reset, **THRESHOLD, **HIDDEN, **k
        )
        for reset in ("subtract", "zero", "none")
    },
    "Lapicque-beta": lambda **k: snntorch.Lapicque(beta=0.9, **THRESHOLD, **HIDDEN, **k),
    "DeltaLeaky": lambda **k: snntorch.DeltaLeaky(
        1.5, beta=decays(0.7, 0.95), learn_beta=True, **HIDDEN, **k
    ),
}
SEQUENCES: dict[str, Callable[..., nn.Module]] = {
    "StateLeaky": lambda **k: snntorch.StateLeaky(decays(0.7, 0.9), N, learn_beta=True, **THRESHOLD, **k),
    "StateLeaky-graded": lambda **k: snntorch.StateLeaky(
        0.9, N, graded_spikes_factor=torch.full((N,), 1.5), learn_graded_spikes_factor=True, **THRESHOLD, **k
    ),
    "StateLeaky-readout": lambda **k: snntorch.StateLeaky(decays(0.7, 0.9), N, learn_beta=True, output=False),
    "LinearLeaky": lambda **k: snntorch.LinearLeaky(
        decays(0.7, 0.9), M, N, learn_beta=True, **THRESHOLD, **k
    ),
    "LeakyParallel": lambda **k: snntorch.LeakyParallel(
        M, N, beta=decays(0.7, 0.9), learn_beta=True, learn_threshold=True, **k
    ),
    "AssociativeLeaky": lambda **k: associative(2, 4, **k),
    "AssociativeLeaky-flat": lambda **k: associative(4, 3, use_q_projection=False, **k),
    "LeakyParallel-fixed": lambda **k: snntorch.LeakyParallel(M, N, beta=0.8, bias=False, **k),
}


# upstream's float32 gradient is itself 1.5e-5 from the one in float64, ours 3e-6
DOUBLE = ("AssociativeLeaky-flat",)


def associative(rows: int, columns: int, spike_grad: Any, **options: Any) -> nn.Module:
    """Its constructor takes no surrogate."""
    neuron = snntorch.AssociativeLeaky(M, rows, columns, rows * columns, **options)
    neuron.spike_grad = spike_grad
    with torch.no_grad():
        for p in neuron.parameters():
            p.mul_(4.0)
    return neuron


def states_of(neuron: Any) -> list[torch.Tensor]:
    return [
        t
        for t in (getattr(neuron, n, None) for n in ("syn_exc", "syn_inh", "mem", "mem_prev"))
        if t is not None
    ]


def gradients(loss: torch.Tensor, net: nn.Module, x: torch.Tensor) -> list[torch.Tensor | None]:
    return list(
        torch.autograd.grad(loss, [x, *(p for p in net.parameters() if p.requires_grad)], allow_unused=True)
    )


def compare(
    actual: list[torch.Tensor | None], expected: list[torch.Tensor | None], tolerance: float = 1e-5
) -> None:
    for a, e in zip(actual, expected, strict=True):
        if e is None or not e.any():
            assert a is None or not a.any()
        else:
            assert a is not None
            assert relative(a, e) < tolerance


def loss_of(*outs: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.stack([(o * torch.randn(o.shape, generator=generator)).sum() for o in outs]).sum()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [None, 0.3], ids=["exact", "window"])
@pytest.mark.parametrize("name", STEPPED)
def test_stepped(name, window, backend, counted):
    def run(ours: bool) -> tuple[Any, ...]:
        torch.manual_seed(1)
        neuron = STEPPED[name](spike_grad=surrogate.fast_sigmoid(5))
        net = on_grid(nn.Sequential(nn.Linear(M, N), neuron), 12.0)
        x = spikes(T, B, M, density=0.3).requires_grad_()
        options: dict[str, Any] = {"backprop_threshold": window, "min_active": 0.0}
        if ours:
            out, mem, _ = unroll(net, x, backend=backend, **options)
        else:
            with ssp.sparse_mode(fuse_time=False, **options):
                outs = [(net(h)[0], neuron.mem) for h in x]
            out, mem = (torch.stack(part) for part in zip(*outs, strict=True))
        states = states_of(neuron)
        return out, mem, states, gradients(loss_of(out, mem, *states), net, x)

    expected = run(ours=False)
    assert not counted
    actual = run(ours=True)
    assert counted[backend, "forward"] == 1
    assert 0.01 < float(expected[0].mean()) < 0.9
    assert torch.equal(actual[0], expected[0])
    for a, e in zip([actual[1], *actual[2]], [expected[1], *expected[2]], strict=True):
        assert torch.equal(a, e)
    compare(actual[3], expected[3])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [None, 0.3], ids=["exact", "window"])
@pytest.mark.parametrize("name", SEQUENCES)
def test_sequence(name, window, backend, counted):
    """A convolution, or torch's RNN, against a recursion: sums are rounded in another order."""

    def run(ours: bool) -> tuple[Any, ...]:
        torch.manual_seed(1)
        neuron = SEQUENCES[name](spike_grad=surrogate.fast_sigmoid(5))
        with torch.no_grad():
            for p in (
                p for n, p in neuron.named_parameters() if "weight_ih" in n or n.endswith("linear.weight")
            ):
                p.mul_(6.0)
        inputs = N if name.startswith("State") else M
        x = spikes(T, B, inputs, density=0.1)
        if name in DOUBLE:
            neuron, x = neuron.double(), x.double()
        x.requires_grad_()
        options: dict[str, Any] = {"backprop_threshold": window, "min_active": 0.0}
        if ours:
            out = unroll(neuron, x, backend=backend, **options).spikes
        else:
            with ssp.sparse_mode(fuse_time=False, **options):
                out = neuron(x)
                out = out[0] if isinstance(out, tuple) else out
        return out, gradients(loss_of(out), neuron, x)

    expected = run(ours=False)
    actual = run(ours=True)
    assert counted[backend, "forward"] == 1
    if name.endswith("readout"):
        assert relative(actual[0], expected[0]) < 1e-6
    else:
        assert 0.01 < float((expected[0] != 0).float().mean()) < 0.9
        assert relative(actual[0], expected[0]) < 1e-6  # the same spikes, times the graded factor
    compare(actual[1], expected[1], 1e-11 if name in DOUBLE else 1e-5)


@pytest.mark.parametrize(
    ("neuron", "reason"),
    [
        (lambda: snntorch.SLSTM(M, N), "LSTM"),
        (lambda: snntorch.SConv2dLSTM(1, 2, 3), "LSTM"),
        (lambda: snntorch.StateLeaky(0.9, N, kernel_truncation_steps=4), "truncation"),
        (lambda: snntorch.LeakyParallel(M, N, weight_hh_enable=True, learn_beta=True), "weight_hh_enable"),
        (lambda: snntorch.LeakyParallel(M, N, weight_hh_enable=True), "not diagonal"),
        (lambda: snntorch.Alpha(0.9, 0.8, inhibition=True), "inhibition"),
    ],
)
def test_what_cannot_be_fused_says_why(neuron, reason):
    module = neuron()
    assert reason in adapter_of(module).neuron(module)


def _replaced_linear():
    class Own(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    module = snntorch.LinearLeaky(0.9, M, N)
    module.linear = Own(M, N)
    return module


def _hooked_linear():
    module = snntorch.LinearLeaky(0.9, M, N)
    module.linear.register_forward_hook(lambda *_: None)
    return module


def _other_rnn():
    module = snntorch.LeakyParallel(M, N, beta=0.9)
    module.rnn.nonlinearity = "tanh"
    return module


@pytest.mark.parametrize("build", [_replaced_linear, _hooked_linear, _other_rnn])
def test_inner_layers_that_are_not_upstreams_own_run(build, counted):
    module, x = build(), spikes(T, B, M, density=0.3)
    assert "replaced or has hooks" in adapter_of(module).neuron(module)
    out = module(x)
    assert torch.equal(unroll(module, x).spikes, out[0] if isinstance(out, tuple) else out)
    assert not counted


def test_a_patched_class_is_left_alone(monkeypatch, counted):
    monkeypatch.setattr(snntorch.Leaky, "forward", lambda self, x, mem=None: x)
    module = snntorch.Leaky(0.9, init_hidden=True)
    assert "forward() was patched by" in adapter_of(module).neuron(module)
    assert "patched" in str(ssp.sparsify(module))
    x = torch.rand(4, 2, 3)
    assert torch.equal(unroll(module, x).spikes, x)
    assert not counted


def test_a_shape_that_upstream_refuses():
    x = torch.rand(5, 2, 3, 4, 5)
    module = snntorch.StateLeaky(0.9, 5)
    with pytest.raises(ValueError, match="unpack"):
        module(x)
    with pytest.raises(ValueError, match="unpack"):
        unroll(module, x)
