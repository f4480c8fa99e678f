"""snnTorch's classes that take all steps at once: what they keep, and how the guard and the counts see their steps."""

from __future__ import annotations

import pytest
import torch
from oracle import relative, spikes
from torch import nn

snntorch = pytest.importorskip("snntorch")
from snntorch import surrogate  # noqa: E402

import snn_sparse_plugin as ssp  # noqa: E402
from snn_sparse_plugin import unroll  # noqa: E402
from snn_sparse_plugin.adapters import adapter_of  # noqa: E402

T, B, N = 30, 3, 9


@pytest.mark.parametrize(
    "build",
    [
        lambda: snntorch.StateLeaky(torch.linspace(0.7, 0.9, N), N, graded_spikes_factor=0.5),
        lambda: snntorch.StateLeaky(0.9, N, output=False),
        lambda: snntorch.LinearLeaky(torch.linspace(0.7, 0.9, N), N, N),
        lambda: snntorch.LinearLeaky(0.9, N, N, output=False),
        lambda: snntorch.LeakyParallel(N, N, beta=0.9),
        lambda: snntorch.AssociativeLeaky(N, 3, 3, 9),
    ],
)
@pytest.mark.parametrize("hidden", [False, True])
def test_attributes_are_left_as_upstreams_forward_leaves_them(build, hidden, counted):
    """``spk`` and ``mem`` of all steps, with their gradient, where the class keeps them; nothing where it does not."""

    def left(ours: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(3)
        module, x = build(), 6 * spikes(T, B, N)
        before = set(vars(module))
        if ours:
            net = nn.Sequential(module, snntorch.StateLeaky(0.9, N)) if hidden else module
            unroll(net, x)
        else:
            module(x)
        assert ours == bool(counted)
        return {name: vars(module)[name] for name in set(vars(module)) - before} | {
            name: value for name, value in module._buffers.items() if name in ("spk", "mem")
        }

    expected, actual = left(ours=False), left(ours=True)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].shape == value.shape
        assert relative(actual[name].detach(), value.detach()) < 1e-6
        assert actual[name].requires_grad == value.requires_grad


@pytest.mark.parametrize("compiled", [False, True])
def test_the_guard_counts_the_steps_of_a_sequence(compiled):
    """A neuron of a class that takes all steps is active in a share of its steps and samples, not of its samples."""
    module = snntorch.StateLeaky(0.5, 2, kernel_truncation_steps=1, spike_grad=surrogate.fast_sigmoid(5))
    assert isinstance(adapter_of(module).neuron(module), str)  # not fused
    x = torch.full((10, 4, 2), 5.0)
    x[3, :, 0] = 1.0  # the first neuron is near its threshold in 1 step of 10, the second never
    x.requires_grad_()
    with ssp.sparse_mode(backprop_threshold=0.1, min_active=0.05):
        call = torch.compile(module, backend="eager") if compiled else module
        call(x)[0].sum().backward()
    assert x.grad is not None
    assert (x.grad[..., 0] != 0).any(1).tolist() == [t == 3 for t in range(10)]
    assert (x.grad[..., 1] != 0).all()  # it would have fallen silent


def test_the_activity_of_a_stepped_sequence_has_its_steps():
    module = nn.Sequential(snntorch.StateLeaky(0.5, 2, kernel_truncation_steps=1))
    ssp.sparsify(module)
    with ssp.record_activity(module) as log:
        module(torch.rand(10, 4, 2, requires_grad=True))
    assert [entry.steps for entry in log["0"]] == [10]
