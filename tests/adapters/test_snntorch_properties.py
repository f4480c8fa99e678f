"""Any shape and any parameters: snnTorch's neurons fused, against their own steps.

In float64, but for recurrent ones: spikes of snnTorch are float32 in every dtype, and do not meet a float64 matrix.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import INTERPRETING, on_grid, relative, spikes
from torch import nn

snntorch = pytest.importorskip("snntorch")
from snntorch import surrogate  # noqa: E402

import snn_sparse_plugin as ssp  # noqa: E402
from snn_sparse_plugin.adapters import adapter_of  # noqa: E402
from snn_sparse_plugin.backends import calls  # noqa: E402

STEPPED = ("Leaky", "Synaptic", "RLeaky", "RSynaptic", "Alpha", "Lapicque", "DeltaLeaky")
RECURRENT = ("RLeaky", "RSynaptic")
SEQUENCES = ("StateLeaky", "LinearLeaky", "LeakyParallel", "AssociativeLeaky")


class Case(NamedTuple):
    name: str
    sizes: tuple[int, int, int, int]  # T, B, M, N
    decay: float
    threshold: float
    reset: str
    window: float | None
    seed: int


def neuron_of(case: Case) -> nn.Module:
    _, _, M, N = case.sizes
    decay = case.decay * torch.linspace(1, 0.8, N)
    slower = 0.9 * decay
    fire: dict[str, Any] = {"spike_grad": surrogate.fast_sigmoid(5)}
    learned = {
        **fire,
        **{"learn_beta": True, "learn_threshold": True},
        "threshold": case.threshold * torch.linspace(0.9, 1.1, N),
    }
    hidden = {**learned, "init_hidden": True, "output": True, "reset_mechanism": case.reset}
    if case.name == "Leaky":
        return snntorch.Leaky(decay, **hidden)
    if case.name == "Synaptic":
        return snntorch.Synaptic(slower, decay, learn_alpha=True, **hidden)
    if case.name == "RLeaky":
        return snntorch.RLeaky(decay, linear_features=N, **hidden)
    if case.name == "RSynaptic":
        return snntorch.RSynaptic(slower, decay, linear_features=N, learn_alpha=True, **hidden)
    if case.name == "Alpha":
        return snntorch.Alpha(decay, slower, **hidden)
    if case.name == "Lapicque":
        return snntorch.Lapicque(R=2.0, C=4.0, time_step=case.decay, **{**hidden, "learn_beta": False})
    if case.name == "DeltaLeaky":
        return snntorch.DeltaLeaky(
            case.threshold, beta=decay, learn_beta=True, init_hidden=True, output=True, **fire
        )
    if case.name == "StateLeaky":
        return snntorch.StateLeaky(decay, N, **learned)
    if case.name == "LinearLeaky":
        return snntorch.LinearLeaky(decay, M, N, **learned)
    if case.name == "LeakyParallel":
        return snntorch.LeakyParallel(
            M, N, beta=case.decay, learn_beta=True, threshold=case.threshold, learn_threshold=True, **fire
        )
    neuron = snntorch.AssociativeLeaky(M, N, 3, 3 * N, use_q_projection=False)
    neuron.spike_grad, neuron.threshold = fire["spike_grad"], torch.tensor(case.threshold / 4)
    return neuron


def run(case: Case, fused: bool) -> tuple[Any, ...]:
    """Output, membranes, hidden states and gradients."""
    snntorch.SpikingNeuron.instances.clear()  # one DeltaLeaky alive breaks utils.reset for everyone
    torch.manual_seed(case.seed)
    T, B, M, N = case.sizes
    neuron = neuron_of(case)
    sequence = case.name in SEQUENCES
    net = neuron if sequence else nn.Sequential(nn.Linear(M, N), neuron)
    dtype = torch.float32 if case.name in RECURRENT else torch.float64
    net = on_grid(net, 12.0).to(dtype)
    x = (
        spikes(T, B, N if case.name == "StateLeaky" else M, density=0.3, seed=case.seed)
        .to(dtype)
        .requires_grad_()
    )
    options: dict[str, Any] = {"backprop_threshold": case.window, "min_active": 0.0}
    if fused:
        out, mem, _ = ssp.unroll(net, x, **options)
    else:
        with ssp.sparse_mode(fuse_time=False, **options):
            if sequence:
                out = net(x)
                out, mem = out if isinstance(out, tuple) else (out, None)
            else:
                outs = [(net(h)[0], neuron.mem) for h in x]
                out, mem = (torch.stack(part) for part in zip(*outs, strict=True))
    states = [] if sequence else list(adapter_of(neuron).read_state(neuron).values())
    generator = torch.Generator().manual_seed(case.seed)
    loss = torch.zeros(())
    for y in (out, *states):
        # numbers that float32 spikes can pass back, all of one sign: no gradient is a difference of large ones
        loss = loss + (y * torch.rand(y.shape, generator=generator)).sum()
    leaves = [x, *(p for p in net.parameters() if p.requires_grad)]
    return out.double(), mem, states, torch.autograd.grad(loss, leaves, allow_unused=True)


@pytest.mark.skipif(INTERPRETING, reason="the interpreter is slow")
@settings(max_examples=50, deadline=None)
@given(
    name=st.sampled_from([*STEPPED, *SEQUENCES]),
    sizes=st.tuples(st.integers(1, 50), st.integers(1, 3), st.integers(1, 12), st.integers(1, 20)),
    decay=st.floats(0.1, 0.98),
    threshold=st.floats(0.3, 2.0),
    reset=st.sampled_from(["subtract", "zero", "none"]),
    window=st.sampled_from([None, 0.2, 1.0]),
    seed=st.integers(0, 1000),
)
def test_any_shape_and_parameters(name, sizes, decay, threshold, reset, window, seed):
    case = Case(name, sizes, decay, threshold, reset, window, seed)
    expected = run(case, fused=False)
    calls.clear()
    actual = run(case, fused=True)
    assert calls["cpu", "forward"] == calls["cpu", "backward"] == 1
    assert torch.equal(actual[0], expected[0])
    for a, e in zip(actual[2], expected[2], strict=True):
        assert torch.equal(a, e)
    if expected[1] is not None:
        exact = name in STEPPED
        assert torch.equal(actual[1], expected[1]) if exact else relative(actual[1], expected[1]) < 1e-11
    if name == "AssociativeLeaky":
        # over a few steps the gradient of a decay is what 1e-8 in a divisor leaves of a difference
        actual, expected = (
            (*found[:3], [torch.cat([g.flatten() for g in found[3]])]) for found in (actual, expected)
        )
    for a, e in zip(actual[3], expected[3], strict=True):
        if e is None or not e.any():
            assert a is None or not a.any()
        else:
            assert relative(a, e) < (1e-5 if name in RECURRENT else 1e-11)
