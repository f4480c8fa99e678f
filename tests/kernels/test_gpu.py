"""The kernels on a device: the interpreter's cases, and sizes it is too slow for."""

import os
from contextlib import nullcontext

import pytest
import torch

pytest.importorskip("triton.language", reason="the triton extra is not installed")
if not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs a CUDA or ROCm device and no TRITON_INTERPRET", allow_module_level=True)

from eprop_run_cases import EPropTests
from eprop_scan_cases import ScanTests
from eprop_step_cases import StepTests
from equation_cases import EquationTests
from half_cases import HalfTests
from helpers import relative
from layer_cases import RECURRENT, LayerTests, compare
from product_cases import ProductTests
from ttfs_cases import TtfsTests
from ttfs_event_cases import TtfsEventTests

from snn_sparse_plugin.core.dynamics import NeuronSpec
from snn_sparse_plugin.learners import eprop


@pytest.mark.gpu
class TestGpu(LayerTests):
    device = "cuda"

    @pytest.mark.parametrize(("B", "N"), [(64, 200), (7, 127), (3, 1000)])
    @pytest.mark.parametrize("T", [100, 333])
    def test_large_shapes(self, T, B, N):
        spec = NeuronSpec(synapse=True)
        compare(spec, self.inputs(spec, T, B, 700, N, density=0.02), backprop_threshold=None)

    @pytest.mark.parametrize("N", [127, 200, 1000])
    def test_large_recurrent(self, N):
        spec = RECURRENT["lif-recurrent"]
        tensors = self.inputs(spec, 100, 8, 50, N, recurrent=True)
        compare(spec, tensors, backprop_threshold=0.3, min_active=0)

    def test_a_new_length_does_not_recompile(self):
        from snn_sparse_plugin.triton_kernels.scans import source_of
        from snn_sparse_plugin.triton_kernels.sources import module_of

        kernel = module_of(source_of(NeuronSpec(), False, "forward"), "forward").forward

        def variants():
            return sum(len(entry[0]) for entry in kernel.device_caches.values())

        compare(NeuronSpec(), self.inputs(NeuronSpec(), 16, 4, 30, 50), backprop_threshold=None)
        before = variants()
        compare(NeuronSpec(), self.inputs(NeuronSpec(), 37, 4, 30, 50), backprop_threshold=None)
        assert variants() == before


@pytest.mark.gpu
class TestGpuEquations(EquationTests):
    device = "cuda"


@pytest.mark.gpu
class TestGpuHalf(HalfTests):
    device = "cuda"


@pytest.mark.gpu
class TestGpuTtfs(TtfsTests):
    device = "cuda"
    backend = "triton"


@pytest.mark.gpu
class TestGpuTtfsEvents(TtfsEventTests):
    device = "cuda"


@pytest.mark.gpu
class TestGpuEPropStep(StepTests):
    device = "cuda"


@pytest.mark.gpu
class TestGpuEPropScan(ScanTests):
    device = "cuda"


@pytest.mark.gpu
class TestGpuEProp(EPropTests):
    device = "cuda"

    def on_device(self):
        return nullcontext()

    def test_a_large_layer(self):
        net = eprop.LSNNNetwork(700, 256, 20, beta=0.1, v_th=0.4)
        x = (torch.rand(100, 16, 700) < 0.02).float()
        loss = lambda y, _: y.square().mean()  # noqa: E731
        found, result = self.run(net, x.cuda(), loss=loss)
        with eprop.EProp(net) as learner:
            expected = learner.run(x, loss)
        assert abs(result.spikes["layers.0"] - expected.spikes["layers.0"]) < 1e-4
        for name, p in net.named_parameters():  # spikes at the threshold may differ where sums are reordered
            assert relative(found[name], p.grad) < 1e-2


@pytest.mark.gpu
class TestGpuProducts(ProductTests):
    device = "cuda"
