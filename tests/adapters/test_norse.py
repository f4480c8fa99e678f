"""Norse: threshold functions, single steps, sequence modules, containers."""

from __future__ import annotations

import copy
import itertools
import threading
import time

import pytest
import torch
from oracle import norse_loop, on_grid, relative, spikes, worst
from torch import nn

norse = pytest.importorskip("norse.torch")
from norse.torch.functional.superspike import SuperSpike  # noqa: E402
from norse.torch.functional.threshold import threshold  # noqa: E402

import snn_sparse_plugin as ssp  # noqa: E402
from snn_sparse_plugin import InputError, SpikeTrain, unroll  # noqa: E402
from snn_sparse_plugin.adapters import norse as adapter_module  # noqa: E402
from snn_sparse_plugin.adapters.norse import NorseAdapter  # noqa: E402
from snn_sparse_plugin.adapters.norse_surrogates import surrogate_of  # noqa: E402
from snn_sparse_plugin.backends import calls  # noqa: E402


@pytest.fixture(autouse=True)
def _fresh():
    torch.manual_seed(0)
    calls.clear()


def forwards() -> int:
    return sum(n for (_, direction), n in calls.items() if direction == "forward")


@pytest.fixture
def zeroed(monkeypatch):
    """Upstream with its SuperSpike gradient zeroed outside a window."""

    def install(window):
        upstream = SuperSpike.apply

        def apply(x, alpha):
            return upstream(torch.where(x.detach().abs() < window, x, x.detach()), alpha)

        monkeypatch.setattr(SuperSpike, "apply", staticmethod(apply))

    return install


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("alpha", [0.5, torch.tensor(3.0)], ids=["float", "tensor"])
@pytest.mark.parametrize("method", ["super", "triangle", "tanh", "circ", "heavi_erfc"])
def test_surrogates_are_the_threshold_methods(method, alpha, dtype):
    x = torch.linspace(-2, 2, 401, dtype=dtype).requires_grad_()
    threshold(x, method, alpha).sum().backward()
    assert relative(surrogate_of(method, alpha).grad(x.detach()), x.grad) < 1e-6


def test_two_threads_hook_a_threshold_once(monkeypatch):
    def upstream(x, alpha):
        return x

    class Function:
        apply = staticmethod(upstream)

    class Slow(dict):
        """Answers late, and each thread at another time."""

        def __contains__(self, key):
            found = super().__contains__(key)
            time.sleep(0.1 if threading.current_thread().name == "first" else 0.3)
            return found

    known = Slow()
    monkeypatch.setattr(adapter_module, "upstream_apply", known)
    monkeypatch.setattr(adapter_module, "threshold_functions", lambda: {Function: "super"})
    threads = [threading.Thread(target=NorseAdapter().install, name=name) for name in ("first", "second")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert known[Function] is upstream
    assert Function.apply is not upstream


def test_heaviside_has_no_gradient():
    assert surrogate_of("heaviside", 1.0).kind == "zero"


def params(n: int) -> dict[str, torch.Tensor]:
    """Learnable parameters; rates are exact at dt = 2^-10."""
    values = {"tau_mem_inv": 256.0, "tau_syn_inv": 512.0, "v_th": 0.5, "v_leak": 0.0625, "v_reset": 0.125}
    return {name: torch.full((n,), value).requires_grad_() for name, value in values.items()}


DT = 2.0**-10
CELLS = {
    "LIFCell": (lambda p: norse.LIFCell(norse.LIFParameters(**p), dt=DT), ()),
    "LIFBoxCell": (lambda p: norse.LIFBoxCell(norse.LIFBoxParameters(**p), dt=DT), ("tau_syn_inv",)),
    "LIFBoxCell-subtract": (
        lambda p: norse.LIFBoxCell(norse.LIFBoxParameters(**p, reset_method=norse.reset_subtract), dt=DT),
        ("tau_syn_inv", "v_reset"),
    ),
    "IAFCell": (
        lambda p: norse.IAFCell(norse.IAFParameters(**p), dt=DT),
        ("tau_mem_inv", "tau_syn_inv", "v_leak"),
    ),
    "LICell": (lambda p: norse.LICell(norse.LIParameters(**p), dt=DT), ("v_th", "v_reset")),
    "LILinearCell": (
        lambda p: norse.LILinearCell(20, 20, norse.LIParameters(**p), dt=DT),
        ("v_th", "v_reset"),
    ),
    "LIFRecurrentCell": (lambda p: norse.LIFRecurrentCell(20, 20, norse.LIFParameters(**p), dt=DT), ()),
}
SEQUENCES = {
    "LIF": (lambda p: norse.LIF(norse.LIFParameters(**p), dt=DT), ()),
    "IAF": (lambda p: norse.IAF(norse.IAFParameters(**p), dt=DT), ("tau_mem_inv", "tau_syn_inv", "v_leak")),
    "LI": (lambda p: norse.LI(norse.LIParameters(**p), dt=DT), ("v_th", "v_reset")),
    "LIFRecurrent": (lambda p: norse.LIFRecurrent(20, 20, norse.LIFParameters(**p), dt=DT), ()),
}


def learnable(entry):
    """A neuron and its parameters, all but the leak per neuron: sequences fill their first state with it."""
    make, unused = entry
    p = params(20)
    p["v_leak"] = torch.tensor(0.0625, requires_grad=True)
    p = {name: value for name, value in p.items() if name not in unused}
    neuron = make(p)
    on_grid_(neuron)
    return neuron, p


def on_grid_(neuron):
    with torch.no_grad():
        for weight in neuron.parameters():
            weight.copy_((weight * 256).round() / 256)


def gradients(out, state, leaves):
    # mostly of one sign: the gradient of a scalar leak would otherwise be a sum of terms that cancel
    generator = torch.Generator().manual_seed(0)
    loss = (out * (1 + torch.randn(out.shape, generator=generator))).sum()
    for value in state:
        loss = loss + (value * (1 + torch.randn(value.shape, generator=generator))).sum()
    return torch.autograd.grad(loss, leaves, allow_unused=True)


@pytest.mark.parametrize("window", [None, 0.15], ids=["exact", "window"])
@pytest.mark.parametrize("name", SEQUENCES)
@pytest.mark.parametrize("batch", [(3,), ()], ids=["batch", "single"])
class TestSequences:
    def test_equals_upstreams_loop(self, name, batch, window, zeroed):
        neuron, p = learnable(SEQUENCES[name])
        x = (spikes(12, *batch, 20, density=0.5) * 0.75).requires_grad_()
        leaves = [x, *p.values(), *neuron.parameters()]
        with ssp.sparse_mode(backprop_threshold=window, min_active=0):
            out, state = neuron(x)
        assert forwards() == 1
        got = gradients(out, state, leaves)
        if window is not None:
            zeroed(window)
        expected, expected_state = neuron(x)
        assert forwards() == 1
        assert torch.equal(out, expected)
        assert type(state) is type(expected_state)
        assert all(torch.equal(a, b) for a, b in zip(state, expected_state, strict=True))
        assert name == "LI" or 0.02 < float(out.detach().mean()) < 0.9
        assert worst(got, gradients(expected, expected_state, leaves)) < 1e-5

    def test_with_a_state(self, name, batch, window):
        neuron, _ = learnable(SEQUENCES[name])
        x = spikes(12, *batch, 20)
        whole, last = neuron(x)
        _, state = neuron(x[:5])
        with ssp.sparse_mode(backprop_threshold=window):
            out, end = neuron(x[5:], state)
        assert forwards() == 1
        assert torch.equal(out, whole[5:])
        assert all(torch.equal(a, b) for a, b in zip(end, last, strict=True))


@pytest.mark.parametrize("name", CELLS)
class TestCells:
    def network(self, name):
        make, unused = CELLS[name]
        neuron, p = learnable((make, unused))
        net = norse.SequentialState(on_grid(nn.Linear(30, 20)), neuron)
        return net, p

    @pytest.mark.parametrize("window", [None, 0.15], ids=["exact", "window"])
    def test_unroll_equals_the_step_loop(self, name, window, zeroed):
        net, p = self.network(name)
        x = spikes(12, 3, 30).requires_grad_()
        leaves = [x, *p.values(), *net.parameters()]
        out, mem, state = unroll(net, x, backprop_threshold=window, min_active=0)
        got = gradients(out, state[1], leaves)
        assert forwards() == 1
        if window is not None:
            zeroed(window)
        expected, expected_state = norse_loop(net, x)
        assert torch.equal(out, expected)
        assert torch.equal(mem[-1], expected_state[1].v)
        assert all(torch.equal(a, b) for a, b in zip(state[1], expected_state[1], strict=True))
        assert worst(got, gradients(expected, expected_state[1], leaves)) < 1e-5

    def test_a_step_in_sparse_mode_is_upstreams_with_the_masked_gradient(self, name, zeroed):
        net, p = self.network(name)
        x = spikes(12, 3, 30).requires_grad_()
        leaves = [x, *p.values(), *net.parameters()]
        with ssp.sparse_mode(backprop_threshold=0.15, min_active=0, fuse_time=False):
            out, state = norse_loop(net, x)
        got = gradients(out, state[1], leaves)
        zeroed(0.15)
        expected, expected_state = norse_loop(net, x)
        assert torch.equal(out, expected)
        assert worst(got, gradients(expected, expected_state[1], leaves)) < 1e-5
        assert forwards() == 0

    def test_continues_from_a_state(self, name):
        net, _ = self.network(name)
        x = spikes(12, 3, 30)
        whole = unroll(net, x)
        first = unroll(net, x[:5])
        second = unroll(net, x[5:], first.state)
        assert torch.equal(torch.cat([first.spikes, second.spikes]), whole.spikes)
        assert first.state[0] is None
        # the loop can go on from it as well
        assert torch.equal(norse_loop(net, x[5:], list(first.state))[0], whole.spikes[5:])


OTHERS = {
    "LIFAdExCell": lambda: norse.LIFAdExCell(),
    "LIFExCell": lambda: norse.LIFExCell(),
    "LIFRefracCell": lambda: norse.LIFRefracCell(),
    "LSNNCell": lambda: norse.LSNNCell(),
    "IzhikevichCell": lambda: norse.IzhikevichCell(spiking_method=norse.tonic_spiking),
    "LSNNRecurrentCell": lambda: norse.LSNNRecurrentCell(20, 20),
}


class TestOtherNeurons:
    @pytest.mark.parametrize("name", OTHERS)
    def test_the_gradient_is_masked_and_the_spikes_are_upstreams(self, name, zeroed):
        torch.manual_seed(1)
        cell, x = OTHERS[name](), (40 * torch.rand(10, 3, 20)).requires_grad_()
        exact = torch.autograd.grad(norse_loop(cell, x)[0].square().sum(), x)[0]
        with ssp.sparse_mode(backprop_threshold=0.5, min_active=0):
            out, _ = norse_loop(cell, x)
        got = torch.autograd.grad(out.square().sum(), x)[0]
        zeroed(0.5)
        expected, _ = norse_loop(cell, x)
        reference = torch.autograd.grad(expected.square().sum(), x)[0]
        assert torch.equal(out, expected)
        assert relative(got, reference) < 1e-5
        assert relative(exact, reference) > 1e-3

    def test_unroll_steps_what_it_does_not_know(self):
        class Own(norse.LSNNCell):
            def forward(self, input_tensor, state=None):
                return super().forward(0.9 * input_tensor, state)

        torch.manual_seed(1)
        net = norse.SequentialState(nn.Linear(30, 20), Own(), nn.Linear(20, 5), norse.LICell())
        x = 20 * spikes(10, 3, 30)
        expected, expected_state = norse_loop(net, x)
        out = unroll(net, x, backprop_threshold=None)
        assert torch.equal(out.spikes, expected)
        assert torch.equal(out.mem[-1], expected_state[3].v)
        assert forwards() == 1

    @pytest.mark.parametrize(
        ("make", "why"),
        [
            (lambda: norse.LIFMCRecurrentCell(4, 4), "coupled by a matrix"),
            (lambda: norse.LIF(record_states=True), "record_states"),
            (lambda: norse.LIFCell(norse.LIFParameters(method="logistic")), "threshold method 'logistic'"),
            (
                lambda: norse.LIFBoxCell(norse.LIFBoxParameters(reset_method=lambda z, v, r, t: v)),
                "reset_method",
            ),
            (lambda: norse.LIFCell(norse.LIFParameters(method="adjoint")), "adjoint"),
        ],
        ids=["LIFMC", "record_states", "method", "reset_method", "adjoint"],
    )
    def test_what_cannot_be_fused_says_why(self, make, why):
        assert why in NorseAdapter().neuron(make())


def sequence_net(**options):
    return norse.SequentialState(
        on_grid(nn.Linear(30, 20)),
        norse.LIF(dt=DT, p=norse.LIFParameters(v_th=torch.tensor(0.5))),
        norse.Lift(on_grid(nn.Linear(20, 7, bias=False))),
        norse.LIFRecurrent(7, 5, dt=DT),
        nn.Dropout(0.0),
        norse.LI(dt=DT),
        **options,
    )


class TestContainers:
    def test_equals_upstream(self):
        net, x = sequence_net(), spikes(12, 3, 30).requires_grad_()
        on_grid_(net[3])
        leaves = [x, *net.parameters()]
        with ssp.sparse_mode(backprop_threshold=None):
            out, state = net(x)
        assert forwards() == 3
        got = gradients(out, state[1], leaves)
        expected, expected_state = net(x)
        assert torch.equal(out, expected)
        for ours, theirs in zip(state, expected_state, strict=True):
            assert type(ours) is type(theirs)
            assert ours is None or all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        assert worst(got, gradients(expected, expected_state[1], leaves)) < 1e-5

    def test_unroll_takes_the_same_path(self):
        net, x = sequence_net(), spikes(12, 3, 30)
        expected, _ = net(x)
        out = unroll(net, SpikeTrain.from_dense(x))
        assert torch.equal(out.spikes, expected)
        assert forwards() == 3

    def test_continues_from_a_state(self):
        net, x = sequence_net(), spikes(12, 3, 30)
        whole, _ = net(x)
        with ssp.sparse_mode():
            first, state = net(x[:5])
            second, _ = net(x[5:], state)
        assert torch.equal(torch.cat([first, second]), whole)

    def test_return_hidden_is_upstreams(self):
        net, x = sequence_net(return_hidden=True), spikes(12, 3, 30)
        expected, _ = net(x)
        with ssp.sparse_mode():
            hidden, _ = net(x)
        assert len(hidden) == 6
        assert all(torch.equal(a, b) for a, b in zip(hidden, expected, strict=True))

    def test_state_hooks_fire(self):
        net, x, seen = sequence_net(), spikes(12, 3, 30), []
        net.register_forward_state_hooks(
            lambda module, args, out: seen.append((type(module).__name__, out[1]))
        )
        with ssp.sparse_mode():
            net(x)
        assert [name for name, _ in seen] == ["LIF", "LIFRecurrent", "LI"]
        assert isinstance(seen[0][1], norse.LIFFeedForwardState)

    def test_hooks_of_a_linear_see_the_whole_sequence(self):
        net, x, seen = sequence_net(), spikes(12, 3, 30), []
        net[0].register_forward_hook(lambda module, args, out: seen.append(out.shape))
        with ssp.sparse_mode():
            out, _ = net(x)
        assert seen == [(12, 3, 20)]
        net[0]._forward_hooks.clear()
        assert torch.equal(out, net(x)[0])

    def test_recorded_states_are_upstreams(self):
        neuron, x = norse.LIF(record_states=True), spikes(12, 3, 20)
        _, expected = neuron(x)
        with ssp.sparse_mode():
            _, states = neuron(x)
        assert states.v.shape == (12, 3, 20)
        assert torch.equal(states.v, expected.v)

    def test_lifted_convolutions(self):
        net = norse.SequentialState(
            norse.Lift(on_grid(nn.Conv2d(1, 3, 3))),
            norse.LIF(dt=DT),
            nn.Flatten(2),
            on_grid(nn.Linear(108, 4)),
            norse.LI(),
        )
        x = spikes(8, 2, 1, 8, 8)
        expected, _ = net(x)
        with ssp.sparse_mode(backprop_threshold=None):
            out, _ = net(x)
        assert torch.equal(out, expected)
        assert forwards() == 2

    def test_samples_without_a_batch(self):
        net = norse.SequentialState(
            norse.Lift(on_grid(nn.Conv2d(1, 3, 3))),
            norse.LIF(dt=DT),
            norse.Lift(nn.MaxPool2d(2)),
            nn.Flatten(1),
            norse.Lift(on_grid(nn.Linear(27, 4))),
            norse.LIF(dt=DT),
        )
        x = spikes(12, 1, 8, 8)
        expected, _ = net(x)
        with ssp.sparse_mode():
            out, _ = net(x)
        assert torch.equal(out, expected)

    def test_a_nested_container(self):
        net = norse.SequentialState(
            norse.SequentialState(on_grid(nn.Linear(30, 20)), norse.LIF(dt=DT)),
            on_grid(nn.Linear(20, 4)),
            norse.LI(dt=DT),
        )
        x = spikes(12, 3, 30)
        expected, expected_state = net(x)
        with ssp.sparse_mode():
            out, state = net(x)
        assert torch.equal(out, expected)
        assert torch.equal(state[0][1].v, expected_state[0][1].v)
        assert forwards() == 2

    @pytest.mark.parametrize("fused", [False, True])
    def test_a_nested_container_of_cells_is_a_loop(self, fused):
        inner = norse.SequentialState(on_grid(nn.Linear(30, 20)), norse.LIFCell(dt=DT))
        net, x = (
            norse.SequentialState(inner, on_grid(nn.Linear(20, 4)), norse.LICell(dt=DT)),
            spikes(12, 3, 30),
        )
        expected, expected_state = norse_loop(net, x)
        ssp.sparsify(net[0], fuse_time=fused)
        out = unroll(net, x)
        assert torch.equal(out.spikes, expected)
        assert torch.equal(out.state[0][1].v, expected_state[0][1].v)
        assert forwards() == 1 + fused

    def test_parameters_per_sample_are_upstreams(self):
        p = norse.LIFParameters(v_th=torch.linspace(0.2, 1.0, 3)[:, None])
        neuron, x = norse.LIF(p, dt=DT), 2 * torch.rand(12, 3, 20)
        expected, _ = neuron(x)
        with ssp.sparse_mode():
            assert torch.equal(neuron(x)[0], expected)

    def test_function_transforms(self):
        cell, x = norse.LIFBoxCell(), torch.linspace(8, 12, 50)
        state = norse.LIFBoxFeedForwardState(torch.zeros(50))

        def total(x):
            return cell(x, state)[0].sum()

        with ssp.sparse_mode(backprop_threshold=0.1, min_active=0):
            grad = torch.func.grad(total)(x)
        assert torch.equal(grad != 0, (0.1 * x - 1).abs() < 0.1)

    def test_function_transforms_of_a_sequence(self):
        neuron, x = norse.LIF(dt=DT), 2 * torch.rand(12, 3, 20)
        state = norse.LIFFeedForwardState(torch.zeros(3, 20), torch.zeros(3, 20))

        def total(x):
            return neuron(x, state)[0].sum()

        expected = torch.func.grad(total)(x)
        with ssp.sparse_mode(backprop_threshold=None):
            assert torch.equal(torch.func.grad(total)(x), expected)
        assert expected.any()

    def test_no_steps_leave_the_initial_state(self):
        neuron = norse.LIF(dt=DT)
        with ssp.sparse_mode():
            out, state = neuron(torch.zeros(0, 3, 20))
            _, after = neuron(spikes(4, 3, 20), state)
            _, expected = neuron(spikes(4, 3, 20))
        assert out.shape == (0, 3, 20)
        assert isinstance(state, norse.LIFFeedForwardState)
        for ours, theirs in zip(after, expected, strict=True):
            assert torch.equal(ours, theirs)

    def test_without_time_fusion_upstreams_forward_runs(self):
        net, x = sequence_net(), spikes(12, 3, 30)
        expected, _ = net(x)
        with ssp.sparse_mode(fuse_time=False):
            out, _ = net(x)
        assert torch.equal(out, expected)
        assert forwards() == 0

    @pytest.mark.parametrize("make", [lambda: sequence_net(), lambda: norse.LIF()], ids=["container", "LIF"])
    def test_outside_it_is_upstream(self, make):
        make()(spikes(5, 3, 30))
        assert forwards() == 0

    def test_wrong_features_name_the_layers(self):
        with (
            ssp.sparse_mode(),
            pytest.raises(InputError, match=r"0→1: input has shape \(5, 3, 31\), weight expects 30"),
        ):
            sequence_net()(torch.zeros(5, 3, 31))


class TestInputs:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
    def test_dtypes_are_upstreams(self, dtype):
        neuron, x = norse.LIF(dt=DT), (2 * torch.rand(6, 3, 20)).to(dtype)
        expected, expected_state = neuron(x)
        with ssp.sparse_mode():
            out, state = neuron(x)
        assert out.dtype == expected.dtype
        assert state.v.dtype == expected_state.v.dtype
        assert torch.equal(out, expected)

    @pytest.mark.parametrize(("x", "state"), [((6, 3, 1), (3, 20)), ((6, 1, 20), (3, 20)), ((6, 1), (20,))])
    def test_a_state_larger_than_the_input(self, x, state):
        neuron, start = norse.LIF(dt=DT), norse.LIFFeedForwardState(torch.rand(state), torch.rand(state))
        x = 2 * torch.rand(x)
        expected, expected_state = neuron(x, start)
        with ssp.sparse_mode():
            out, end = neuron(x, start)
        assert torch.equal(out, expected)
        assert all(torch.equal(a, b) for a, b in zip(end, expected_state, strict=True))

    def test_sparse_tensors_are_upstreams(self):
        neuron, x = norse.LIFRecurrentCell(20, 8), spikes(3, 20).to_sparse()
        expected, _ = neuron(x)
        with ssp.sparse_mode():
            out, _ = neuron(x)
        assert out.is_sparse
        assert torch.equal(out.to_dense(), expected.to_dense())

    def test_stateful_is_still_seen(self):
        # SequentialState and Lift look at the signature of forward
        for module in (norse.LIFCell(), norse.LIF(), norse.LIFRecurrent(3, 3), norse.LILinearCell(3, 3)):
            assert norse.SequentialState(module).stateful_layers == [True]
        assert norse.Lift(norse.LIFCell()).is_stateful

    @pytest.mark.parametrize(("T", "B"), itertools.product((0, 4), (0, 3)))
    def test_empty(self, T, B):
        net = norse.SequentialState(nn.Linear(30, 20), norse.LIFCell(), nn.Linear(20, 4), norse.LICell())
        out = unroll(net, torch.zeros(T, B, 30))
        assert out.spikes.shape == out.mem.shape == (T, B, 4)

    def test_deepcopy_keeps_the_parameters_live(self):
        neuron, p = learnable(SEQUENCES["LIF"])
        twin = copy.deepcopy(neuron)
        assert twin.p.v_th is not p["v_th"]
        assert neuron.p.v_th is p["v_th"]


@pytest.mark.parametrize("build", [lambda: norse.LIFCell(), lambda: norse.LSNNCell()], ids=["LIF", "LSNN"])
def test_exported_as_without_sparse_mode(build):
    net, x = norse.SequentialState(build()), torch.randn(2, 10)

    def operators():
        graph = torch.export.export(net, (x,), strict=False).graph
        return [str(node.target) for node in graph.nodes]

    try:
        plain = operators()
    except StopIteration:  # torch 2.8, with LSNNCell
        pytest.skip("this torch cannot export Norse's own cell")
    with ssp.sparse_mode(backprop_threshold=0.1):
        assert operators() == plain
