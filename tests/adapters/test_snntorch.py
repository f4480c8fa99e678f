"""snnTorch: spike functions recognised, single steps masked, what can be fused and what not."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import compiles_whole
from oracle import relative, windowed
from torch import nn

snntorch = pytest.importorskip("snntorch")
from snntorch import surrogate  # noqa: E402

import snn_sparse_plugin as ssp  # noqa: E402
from snn_sparse_plugin.adapters.snntorch import SnnTorchAdapter  # noqa: E402
from snn_sparse_plugin.adapters.snntorch_surrogates import recognise  # noqa: E402

FACTORIES = {
    "atan": lambda: surrogate.atan(),
    "atan-alpha": lambda: surrogate.atan(alpha=5.0),
    "fast_sigmoid-int": lambda: surrogate.fast_sigmoid(slope=25),
    "fast_sigmoid-tensor": lambda: surrogate.fast_sigmoid(slope=torch.tensor(10.0)),
    "sigmoid": lambda: surrogate.sigmoid(slope=5),
    "straight_through": lambda: surrogate.straight_through_estimator(),
    "triangular": lambda: surrogate.triangular(threshold=2),
    "heaviside": lambda: surrogate.heaviside(),
    "spike_rate_escape": lambda: surrogate.spike_rate_escape(beta=2, slope=3),
    "SFS": lambda: surrogate.SFS(slope=5, B=-0.2),
    "LeakyParallel": lambda: snntorch.LeakyParallel(3, 2).spike_grad,
    "Heaviside.apply": lambda: surrogate.Heaviside.apply,
    # what Heaviside.apply is from torch 2.14 on, until the first sparse block
    "Heaviside.apply-of-C++": lambda: torch._C._FunctionBase.__dict__["apply"].__get__(
        None, surrogate.Heaviside
    ),
    "StraightThroughEstimator.apply": lambda: surrogate.StraightThroughEstimator.apply,
}
KINDS = {
    "LeakyParallel": "atan",
    "SFS": "sparse_fast_sigmoid",
    "StraightThroughEstimator.apply": "straight_through",
}


@pytest.fixture(autouse=True)
def _few_instances():
    """snnTorch keeps every neuron alive; a DeltaLeaky among them breaks its utils.reset."""
    snntorch.SpikingNeuron.instances.clear()
    torch.manual_seed(0)


class TestSpikeFunctions:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
    @pytest.mark.parametrize("name", FACTORIES)
    def test_formula_is_upstreams_backward(self, name, dtype):
        function = FACTORIES[name]()
        found = recognise(function)
        assert found.kind == KINDS.get(name, name.partition("-")[0].partition(".")[0].lower())
        x = torch.linspace(-2, 2, 401, dtype=dtype).requires_grad_()
        function(x).sum().backward()
        assert relative(found.grad(x.detach()), x.grad) < 1e-6

    def test_parameters_are_read_from_the_closure(self):
        assert recognise(surrogate.fast_sigmoid(slope=100)).params == (100.0,)
        assert recognise(surrogate.SFS(slope=7, B=0.5)).params == (7.0, 0.5)
        assert recognise(surrogate.spike_rate_escape(beta=2, slope=9)).params == (2.0, 9.0)

    def test_a_tensor_parameter_is_read_anew(self):
        slope = torch.tensor(10.0)
        function = surrogate.fast_sigmoid(slope=slope)
        recognise(function)
        slope.fill_(20.0)
        assert recognise(function).params == (20.0,)

    def test_disabled_surrogate_has_no_gradient(self):
        assert recognise(snntorch.Leaky(0.9, surrogate_disable=True).spike_grad).kind == "zero"

    @pytest.mark.parametrize(
        "function",
        [
            surrogate.SSO(),
            surrogate.custom_surrogate(lambda x, grad, out: grad * 2),
            lambda x: surrogate.atan()(x),
            surrogate.fast_sigmoid(slope=torch.ones(3)),
        ],
        ids=["SSO", "custom_surrogate", "lambda", "one slope per neuron"],
    )
    def test_anything_else_is_custom(self, function):
        found = recognise(function)
        assert found.kind == "custom"
        assert found.function is function

    def test_our_own_surrogates_are_spike_functions(self):
        own = ssp.Surrogate("fast_sigmoid", (25.0,))
        assert recognise(own) is own
        x = torch.randn(4, 30, requires_grad=True)
        state = torch.zeros(4, 30)
        spk, _ = snntorch.Leaky(0.9, spike_grad=own)(x, state)
        ref, _ = snntorch.Leaky(0.9, spike_grad=surrogate.fast_sigmoid(25))(x, state)
        assert torch.equal(spk, ref)
        a, b = (torch.autograd.grad(s.sum(), x)[0] for s in (spk, ref))
        assert relative(a, b) < 1e-6


# every neuron of snnTorch that takes one step at a time, with init_hidden=True
STEPPED = {
    "Leaky": lambda **k: snntorch.Leaky(0.9, **k),
    "Leaky-reset_delay": lambda **k: snntorch.Leaky(0.9, reset_delay=False, **k),
    "Leaky-quant": lambda **k: snntorch.Leaky(0.9, state_quant=lambda x: x * 1.0, **k),
    "Leaky-inhibition": lambda **k: snntorch.Leaky(0.9, inhibition=True, **k),
    "Leaky-graded": lambda **k: snntorch.Leaky(0.9, graded_spikes_factor=2.0, **k),
    "Synaptic": lambda **k: snntorch.Synaptic(0.8, 0.9, **k),
    "RLeaky": lambda **k: snntorch.RLeaky(0.9, linear_features=40, **k),
    "RLeaky-one-to-one": lambda **k: snntorch.RLeaky(0.9, V=0.5, all_to_all=False, **k),
    "RSynaptic": lambda **k: snntorch.RSynaptic(0.8, 0.9, linear_features=40, **k),
    "Lapicque": lambda **k: snntorch.Lapicque(beta=0.9, threshold=0.1, **k),
    "Alpha": lambda **k: snntorch.Alpha(alpha=0.9, beta=0.8, **k),
    "SLSTM": lambda **k: snntorch.SLSTM(40, 40, threshold=0.05, **k),
    "DeltaLeaky": lambda **k: snntorch.DeltaLeaky(0.5, 0.9, **k),
}


def run_steps(neuron, x):
    outs = [neuron(h) for h in x.unbind(0)]
    return torch.stack([o[0] if isinstance(o, tuple) else o for o in outs])


@pytest.mark.filterwarnings("ignore:Inhibition")
class TestSteps:
    @pytest.mark.parametrize("name", STEPPED)
    def test_spikes_are_upstreams_and_the_gradient_is_masked(self, name):
        torch.manual_seed(1)
        function = surrogate.fast_sigmoid(25)
        ours = STEPPED[name](spike_grad=function, init_hidden=True)
        theirs = copy.deepcopy(ours)
        theirs.spike_grad = windowed(function, 0.15)
        x = torch.randn(6, 5, 40, requires_grad=True)
        with ssp.sparse_mode(backprop_threshold=0.15, min_active=0):
            spk = run_steps(ours, x)
        expected = run_steps(theirs, x)
        dense = run_steps(copy.deepcopy(STEPPED[name](spike_grad=function, init_hidden=True)), x)
        assert torch.equal(spk, expected)
        assert spk.sum() > 0
        g = torch.randn_like(spk)
        ours_g, theirs_g, dense_g = (torch.autograd.grad((s * g).sum(), x)[0] for s in (spk, expected, dense))
        assert relative(ours_g, theirs_g) < 1e-5
        assert relative(dense_g, theirs_g) > 1e-3

    def test_leaky_parallel_is_masked(self):
        net = snntorch.LeakyParallel(6, 40)
        x = torch.randn(5, 4, 6)
        dense, expected = net(x), None
        g = torch.randn_like(dense)
        weight = net.rnn.weight_ih_l0
        exact = torch.autograd.grad((dense * g).sum(), weight)[0]
        function = net.spike_grad
        net.spike_grad = windowed(function, 0.2)
        expected = torch.autograd.grad((net(x) * g).sum(), weight)[0]
        net.spike_grad = function
        with ssp.sparse_mode(backprop_threshold=0.2, min_active=0):
            spk = net(x)
        assert torch.equal(spk, dense)
        masked = torch.autograd.grad((spk * g).sum(), weight)[0]
        assert relative(masked, expected) < 1e-5
        assert relative(exact, expected) > 1e-3

    def test_exact_mode_is_upstream(self):
        neuron = snntorch.Leaky(0.9, init_hidden=True)
        x = torch.randn(6, 5, 40, requires_grad=True)
        twin = copy.deepcopy(neuron)
        with ssp.sparse_mode(backprop_threshold=None):
            grad = torch.autograd.grad(run_steps(neuron, x).sum(), x)[0]
        assert torch.equal(grad, torch.autograd.grad(run_steps(twin, x).sum(), x)[0])

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
    def test_dtypes_are_upstreams(self, dtype):
        neuron, x = snntorch.Leaky(0.9), torch.randn(5, 40, dtype=dtype)
        expected, mem = neuron(x, torch.zeros_like(x))
        with ssp.sparse_mode(backprop_threshold=0.2):
            x.requires_grad_()
            spk, mem2 = neuron(x, torch.zeros_like(x))
            spk.sum().backward()
        assert (spk.dtype, mem2.dtype, x.grad.dtype) == (expected.dtype, mem.dtype, dtype)
        assert torch.equal(spk, expected)

    def test_too_few_active_neurons_run_exact(self):
        neuron, x = snntorch.Leaky(0.9), torch.full((5, 40), -3.0, requires_grad=True)
        grads = []
        for least in (0.0, 0.01):
            with ssp.sparse_mode(backprop_threshold=0.2, min_active=least):
                spk, _ = neuron(x, torch.zeros(5, 40))
            grads.append(torch.autograd.grad(spk.sum(), x)[0])
        assert grads[0].abs().sum() == 0
        assert (grads[1] != 0).all()

    def test_a_spike_function_that_is_a_module(self):
        class Spike(nn.Module):
            def forward(self, x):
                return surrogate.fast_sigmoid(25)(x)

        neuron, x = snntorch.Leaky(0.9, spike_grad=Spike()), torch.randn(5, 40, requires_grad=True)
        with ssp.sparse_mode(backprop_threshold=0.2, min_active=0):
            spk, mem = neuron(x, torch.zeros(5, 40))
        spk.sum().backward()
        assert torch.equal(x.grad != 0, (mem - 1).abs() < 0.2)

    @compiles_whole
    @pytest.mark.parametrize(
        "build", [lambda k: k, lambda k: k | {"reset_mechanism": "zero"}], ids=["subtract", "zero"]
    )
    def test_compiles_without_a_graph_break(self, build):
        neuron = snntorch.Leaky(0.9, spike_grad=surrogate.fast_sigmoid(25), **build({}))
        x = torch.randn(5, 40, requires_grad=True)

        def run():
            spk, _ = neuron(x, torch.zeros(5, 40))
            return spk, torch.autograd.grad(spk.sum(), x)[0]

        compiled = torch.compile(
            lambda: neuron(x, torch.zeros(5, 40))[0], fullgraph=True, backend="aot_eager"
        )

        def run_compiled():
            spk = compiled()
            return spk, torch.autograd.grad(spk.sum(), x)[0]

        for mode in (None, 0.2, None, 0.1):  # a graph must notice that the mode changed
            if mode is None:
                expected, got = run(), run_compiled()
            else:
                with ssp.sparse_mode(backprop_threshold=mode, min_active=0):
                    expected, got = run(), run_compiled()
            assert torch.equal(got[0], expected[0])
            assert relative(got[1], expected[1]) < 1e-6


class Overriding:
    """Built at call time, so that the module can be collected without snnTorch."""

    @staticmethod
    def make():
        class Mine(snntorch.Leaky):
            def _base_state_function(self, input_):
                return super()._base_state_function(input_) + 0.1

        return Mine(0.9)


def changed_reset():
    neuron = snntorch.Leaky(0.9, reset_delay=False)
    neuron.reset_mechanism = "zero"
    return neuron


@pytest.mark.filterwarnings("ignore:Inhibition")
@pytest.mark.parametrize(
    ("build", "why"),
    [
        (lambda: snntorch.Leaky(0.9, state_quant=lambda x: x), "state_quant"),
        (lambda: snntorch.Leaky(0.9, inhibition=True), "inhibition"),
        (lambda: snntorch.RLeaky(0.9, conv2d_channels=3, kernel_size=3), "Conv2d"),
        (lambda: snntorch.RSynaptic(0.8, 0.9, linear_features=4, reset_delay=False), "raises in snnTorch"),
        (lambda: snntorch.SLSTM(4, 4), "LSTM"),
        (Overriding.make, "overrides _base_state_function"),
        (changed_reset, "changed after construction"),
        (lambda: snntorch.Leaky(0.9, spike_grad=lambda x: torch.sigmoid(x)), "none of snnTorch's"),
    ],
    ids=[
        "state_quant",
        "inhibition",
        "conv",
        "RSynaptic",
        "SLSTM",
        "subclass",
        "setter",
        "sigmoid",
    ],
)
def test_what_cannot_be_fused_says_why(build, why):
    assert why in SnnTorchAdapter().neuron(build())


def test_a_changed_reset_follows_the_state_function():
    # upstream's setter leaves the delayed reset as it was built
    neuron = snntorch.Leaky(0.9)
    neuron.reset_mechanism = "zero"
    assert SnnTorchAdapter().neuron(neuron).spec.reset == "subtract"


def test_fire_takes_its_keywords():
    lif, mem = snntorch.Leaky(0.9), torch.tensor([[0.5, 1.5]])
    with ssp.sparse_mode():
        assert torch.equal(lif.fire(mem=mem), torch.tensor([[0.0, 1.0]]))
    assert torch.equal(lif.fire(mem=mem), torch.tensor([[0.0, 1.0]]))
