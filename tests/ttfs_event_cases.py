"""Checks of the event simulator on the Triton kernels; the CPU's is the oracle."""

import pytest
import torch
from torch import nn

from snn_sparse_plugin.core.config import SparseConfig, use_config
from snn_sparse_plugin.layers.ttfs import TTFS, TTFSEncoder, to_snn

LAYERS = {
    "dense": ([nn.Linear(30, 21), TTFS()], (30,)),
    "conv": ([nn.Conv2d(2, 5, 3, padding=1), TTFS()], (2, 5, 6)),
    "conv-groups-stride": ([nn.Conv2d(4, 6, (3, 2), (2, 1), (0, 1), 1, 2, False), TTFS()], (4, 7, 5)),
    "conv-dilation": ([nn.MaxPool2d(2), nn.Conv2d(2, 3, 2, dilation=2), TTFS()], (2, 9, 8)),
    "average": ([nn.AvgPool2d(2), nn.Conv2d(2, 3, 2), TTFS()], (2, 5, 7)),
    "image-to-dense": (
        [nn.Conv2d(1, 3, 2), TTFS(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, 4)],
        (1, 5, 6),
    ),
}


class TtfsEventTests:
    device = "cpu"

    @pytest.mark.parametrize(
        ("kind", "early"),
        [*((kind, None) for kind in LAYERS), *((kind, 5) for kind in ("dense", "conv-dilation", "average"))],
    )
    def test_equals_the_cpu(self, kind, early, counted):
        torch.manual_seed(0)
        layers, shape = LAYERS[kind]
        x = torch.rand(2, *shape) * (torch.rand(2, *shape) < 0.6)
        net = to_snn(nn.Sequential(TTFSEncoder(), *layers).eval(), x, exact_grid=True)
        with use_config(SparseConfig(backend="auto" if self.device == "cpu" else "cpu")):
            expected = net.run(x, early_firing=early, record=True)
        counted.clear()
        with use_config(SparseConfig(backend="triton")):
            found = net.to(self.device).run(x.to(self.device), early_firing=early, record=True)
        assert counted["triton", "ttfs_events"] == len(net.stages)
        assert not counted["cpu", "ttfs_events"]
        for name, times in expected.times.items():
            assert torch.equal(found.times[name].cpu(), times)
            assert torch.equal(found.spikes[name].cpu(), expected.spikes[name])
        for name, count in expected.synops.items():
            assert torch.equal(found.synops[name].cpu(), count)
        assert torch.equal(found.output.cpu(), expected.output)

    @pytest.mark.parametrize("early", [None, 4])
    def test_no_spikes_and_no_samples(self, early):
        layers, shape = LAYERS["conv"]
        net = to_snn(nn.Sequential(TTFSEncoder(), *layers).eval(), torch.rand(1, *shape)).to(self.device)
        with use_config(SparseConfig(backend="triton")):
            silent = net.run(torch.zeros(2, *shape, device=self.device), early_firing=early)
            assert not silent.synops["2"].any()
            nothing = net.run(torch.zeros(0, *shape, device=self.device), early_firing=early)
            assert nothing.output.shape == (0, *net.stages[0].out_shape)
