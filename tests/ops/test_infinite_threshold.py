"""A threshold of infinity is a neuron that never fires, as upstream runs it."""

import pytest
import torch

from snn_sparse_plugin import sparse_mode

snntorch = pytest.importorskip("snntorch")


def _trained(lif, linear, x):
    linear.zero_grad()
    mem, spikes = lif.reset_mem(), []
    for step in x:
        spike, mem = lif(linear(step), mem)
        spikes.append(spike)
    mem.sum().backward()
    return torch.stack(spikes).detach(), mem.detach(), linear.weight.grad.clone()


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "windowed"])
@pytest.mark.parametrize("threshold", [float("inf"), torch.tensor([1.0, float("inf")])], ids=["all", "one"])
@pytest.mark.parametrize("reset", ["none", "zero"])
def test_spikes_membranes_and_gradients_are_upstreams(reset, threshold, exact):
    torch.manual_seed(0)
    lif, linear = snntorch.Leaky(0.9, threshold=threshold, reset_mechanism=reset), torch.nn.Linear(3, 2)
    x = torch.rand(7, 2, 3) * 3
    expected = _trained(lif, linear, x)
    with sparse_mode(backprop_threshold=None if exact else "auto"):
        got = _trained(lif, linear, x)
    assert torch.equal(got[0], expected[0])
    for a, b in zip(got[1:], expected[1:], strict=True):
        torch.testing.assert_close(a, b)
