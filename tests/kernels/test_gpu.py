"""The kernels on a device: the interpreter's cases, and sizes it is too slow for."""

import os

import pytest
import torch

pytest.importorskip("triton.language", reason="the triton extra is not installed")
if not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs a CUDA or ROCm device and no TRITON_INTERPRET", allow_module_level=True)

from eprop_scan_cases import ScanTests
from eprop_step_cases import StepTests
from equation_cases import EquationTests
from half_cases import HalfTests
from layer_cases import RECURRENT, LayerTests, compare
from product_cases import ProductTests
from ttfs_cases import TtfsTests
from ttfs_event_cases import TtfsEventTests

from snn_sparse_plugin.core.dynamics import NeuronSpec


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

    def test_a_learner_on_the_device(self):
        from snn_sparse_plugin.learners import eprop

        net = eprop.LSNNNetwork(20, 33, 4, beta=0.3, v_th=0.4).cuda().double()
        x = (torch.rand(30, 3, 20, device="cuda") < 0.3).double()
        with eprop.detached(net):
            state, total = None, 0.0
            for now in x:
                y, state = net(now, state)
                total = total + y.square().sum()
            total.backward()
        expected = [p.grad.clone() for p in net.parameters()]
        net.zero_grad()
        with eprop.EProp(net, chunk=7) as learner:
            learner.run(x, lambda y, _: y.square().sum())
        for p, grad in zip(net.parameters(), expected, strict=True):
            assert (p.grad - grad).norm() < 1e-12 * grad.norm()


@pytest.mark.gpu
class TestGpuProducts(ProductTests):
    device = "cuda"
