"""Steps that wait for nothing: captured in a CUDA graph they replay as eager ones, and no call synchronises."""

import pytest
import torch

pytest.importorskip("triton.language", reason="the triton extra is not installed")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA or ROCm device", allow_module_level=True)

import snntorch
from snntorch import utils
from torch import nn

import snn_sparse_plugin as ssp
from snn_sparse_plugin.core.dynamics import NeuronParams
from snn_sparse_plugin.ops import spiking_layer

pytestmark = pytest.mark.gpu
T, B, M, N = 40, 8, 70, 33


def spikes():
    return (torch.rand(T, B, M, device="cuda") < 0.1).float()


class Layer(nn.Module):
    """The op alone."""

    def __init__(self, **options):
        super().__init__()
        self.weight, self.options = nn.Parameter(torch.randn(N, M) * 0.5), options

    def forward(self, x):
        out = spiking_layer(x, self.weight, params=NeuronParams(mem=0.9), backend="triton", **self.options)
        return out.spikes


class Unrolled(nn.Module):
    def __init__(self, neuron):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(M, 50), neuron(), nn.Linear(50, N), neuron())

    def forward(self, x):
        return ssp.unroll(self.net, x)[0]


class Loop(Unrolled):
    """An unmodified loop, to be run in sparse mode."""

    def forward(self, x):
        utils.reset(self.net)
        with ssp.sparse_mode():
            return torch.stack([self.net(step) for step in x])


def leaky():
    return snntorch.Leaky(0.9, init_hidden=True)


def recurrent():
    return snntorch.RLeaky(0.9, all_to_all=False, init_hidden=True)


MODELS = {
    "op": Layer,
    "op-exact": lambda: Layer(backprop_threshold=None),
    "op-guarded": lambda: Layer(min_active=0.5, backprop_threshold=0.05),
    "unroll": lambda: Unrolled(leaky),
    "unroll-recurrent": lambda: Unrolled(recurrent),
    "loop": lambda: Loop(leaky),
}


def grads(model):
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", MODELS)
def test_a_captured_step_replays_as_an_eager_one(name):
    torch.manual_seed(0)
    model, x = MODELS[name]().cuda(), spikes()

    def step():
        model.zero_grad(set_to_none=False)
        out = model(x)
        out.sum(0).square().sum().backward()
        return out

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for seed in (1, 2):
        torch.manual_seed(seed)
        x.copy_(spikes())
        graph.replay()
        replayed, found = out.clone(), grads(model)
        expected = step()
        assert torch.equal(replayed, expected)
        for got, want in zip(found, grads(model), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_a_captured_training_step_learns():
    torch.manual_seed(0)
    model, x = Unrolled(leaky).cuda(), spikes()
    target = torch.randint(0, N, (B,), device="cuda")
    optimizer = torch.optim.Adam(model.parameters(), 1e-2, capturable=True)

    def step():
        optimizer.zero_grad(set_to_none=False)
        loss = nn.functional.cross_entropy(model(x).sum(0), target)
        loss.backward()
        optimizer.step()
        return loss

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        before = [step() for _ in range(3)]
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    for _ in range(50):
        graph.replay()
    assert loss.item() < before[0].item() / 2


@pytest.mark.parametrize("name", MODELS)
def test_no_step_waits_for_the_device(name):
    torch.manual_seed(0)
    model, x = MODELS[name]().cuda(), spikes()
    for _ in range(2):  # kernels are compiled
        model(x).sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            model.zero_grad()
            model(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_torch_compile_with_cuda_graphs():
    """The op is one node of the graph; what torch does not capture around it runs as it is."""
    torch.manual_seed(0)
    model = Layer().cuda()
    x = spikes()
    compiled = torch.compile(model, mode="reduce-overhead")
    with ssp.sparse_mode(backend="triton"):
        expected = model(x)
        (want,) = torch.autograd.grad(expected.sum(), [model.weight])
        for _ in range(4):  # warm-up, capture, replays
            torch.compiler.cudagraph_mark_step_begin()
            found = compiled(x)
            (got,) = torch.autograd.grad(found.sum(), [model.weight])
            assert torch.equal(found, expected)
            torch.testing.assert_close(got, want)
