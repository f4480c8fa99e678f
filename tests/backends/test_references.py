"""Kernels give back what they allocate: their parts count no references, and those that allocate are marked by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numba.core.runtime import _nrt_python
from torch import nn

import snn_sparse_plugin as ssp
from snn_sparse_plugin.backends.cpu.jit import kernel

snn = pytest.importorskip("snntorch")
from snntorch import surrogate, utils  # noqa: E402


def dense(neuron: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(40, 30), neuron, nn.Linear(30, 20), snn.Leaky(0.9, init_hidden=True))


def conv(pool: nn.Module) -> nn.Module:
    parts = nn.Conv2d(2, 4, 3), pool, snn.Leaky(0.9, init_hidden=True), nn.Conv2d(4, 4, 2), nn.Flatten()
    return nn.Sequential(*parts, nn.Linear(16, 5), snn.Leaky(0.9, init_hidden=True))


HIDDEN = {"init_hidden": True}
NETS = {
    "leaky": lambda: dense(snn.Leaky(0.9, **HIDDEN)),
    "atan": lambda: dense(snn.Leaky(0.9, spike_grad=surrogate.atan(), **HIDDEN)),
    "learned": lambda: dense(snn.Leaky(torch.rand(30), learn_beta=True, learn_threshold=True, **HIDDEN)),
    "zero": lambda: dense(snn.Leaky(0.9, reset_mechanism="zero", **HIDDEN)),
    "synaptic": lambda: dense(snn.Synaptic(0.8, 0.9, **HIDDEN)),
    "recurrent": lambda: dense(snn.RLeaky(0.9, linear_features=30, **HIDDEN)),
    "alpha": lambda: dense(snn.Alpha(0.9, 0.8, **HIDDEN)),
    "max pool": lambda: conv(nn.MaxPool2d(2)),
    "average pool": lambda: conv(nn.AvgPool2d(2)),
}


def kept() -> int:
    """Pieces of memory that kernels have allocated and not given back."""
    return _nrt_python.memsys_get_stats_alloc() - _nrt_python.memsys_get_stats_free()


@pytest.fixture
def _counted() -> None:
    _nrt_python.memsys_enable_stats()


@pytest.mark.parametrize("threshold", [None, "auto"])
@pytest.mark.parametrize("name", NETS)
@pytest.mark.usefixtures("_counted")
def test_a_training_step_keeps_nothing(name: str, threshold: str | None) -> None:
    torch.manual_seed(0)
    net = NETS[name]()
    x = (torch.rand(12, 4, *((2, 8, 8) if "pool" in name else (40,))) < 0.2).float()
    found = []
    for _ in range(4):
        utils.reset(net)
        spikes, mem, _ = ssp.unroll(net, x, backprop_threshold=threshold)
        (spikes.sum() + mem.square().mean()).backward()
        del spikes, mem
        found.append(kept())
    assert found[1] == found[2] == found[3]


@kernel(forceinline=True)
def _filled(n):  # type: ignore[no-untyped-def]
    return np.zeros(n)


@kernel()
def _first_of_filled(n):  # type: ignore[no-untyped-def]
    return _filled(n)[0]


def test_a_part_that_is_not_marked_cannot_make_an_array() -> None:
    with pytest.raises(Exception, match="passed into the function as argument"):
        _first_of_filled(3)
