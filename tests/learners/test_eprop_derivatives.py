"""Local derivatives by kernels: every entry against autograd through the specification, for every neuron they take."""

import norse.torch as norse
import pytest
import snntorch as snn
import torch
from eprop_cases import (
    NETWORKS,
    C,
    M,
    N,
    SnnNet,
    build,
    grads,
    inputs,
    learned,
    loop,
    loss_of,
    options,
    oracle,
    silent_leaky,
    spike,
)
from eprop_step_cases import compare, family, name_of, states_of
from torch import nn

from snn_sparse_plugin import Surrogate, UnsupportedError
from snn_sparse_plugin.adapters import adapter_of
from snn_sparse_plugin.adapters.base import Neuron
from snn_sparse_plugin.adapters.norse import NorseAdapter
from snn_sparse_plugin.adapters.snntorch import SnnTorchAdapter
from snn_sparse_plugin.core.dynamics import NeuronSpec
from snn_sparse_plugin.core.equations import Equations
from snn_sparse_plugin.core.surrogates import KINDS
from snn_sparse_plugin.learners import eprop
from snn_sparse_plugin.learners.eprop import watch
from snn_sparse_plugin.learners.eprop.described import described, equations, parameters
from snn_sparse_plugin.learners.eprop.states import floats


@pytest.mark.parametrize("spec", list(family()), ids=name_of)
def test_the_canonical_family(spec):
    for recurrent in (False, True) if spec.spiking else (False,):
        check_member(spec, recurrent)


def check_member(spec, recurrent):
    for dtype, per_neuron in ((torch.float64, True), (torch.float64, False), (torch.float32, True)):
        matters = compare(spec, Surrogate("fast_sigmoid", (5.0,)), dtype, recurrent, per_neuron)
        assert matters == {*range(1 + len(states_of(spec)))}


@pytest.mark.parametrize("kind", KINDS)
def test_every_surrogate(kind):
    from snn_sparse_plugin.core.surrogates import _TABLE

    surrogate = Surrogate(kind, tuple(0.75 + 0.5 * k for k in range(len(_TABLE[kind][1]))))
    spec = NeuronSpec("euler", True, "value", "immediate", attached=True)
    for dtype in (torch.float64, torch.float32):
        if kind == "zero":  # no spike depends on anything
            continue
        compare(spec, surrogate, dtype, per_neuron=True)


def library_equations():
    from snn_sparse_plugin.adapters import norse_equations as of_norse
    from snn_sparse_plugin.adapters import snntorch_neurons as of_snntorch
    from snn_sparse_plugin.learners.eprop import lsnn

    yield "lsnn", lsnn._EQUATIONS, True
    for recurrent in (False, True):
        yield (
            f"norse-lsnn-{recurrent}",
            Equations(of_norse.adaptive_lif(recurrent), ("v", "i", "b")),
            recurrent,
        )
        yield (
            f"norse-refractory-{recurrent}",
            Equations(of_norse.refractory_lif(recurrent), ("v", "i", "rho")),
            recurrent,
        )
    yield "izhikevich", Equations(of_norse.IZHIKEVICH, ("v", "u")), True
    for reset in ("subtract", "zero", "none"):
        text = of_snntorch._ALPHA + of_snntorch._ALPHA_RESETS[reset] + of_snntorch._FIRE
        yield f"alpha-{reset}", Equations(text, ("syn_exc", "syn_inh", "mem"), membrane="mem"), False
        text = of_snntorch._LAPICQUE + of_snntorch._LAPICQUE_RESETS[reset] + of_snntorch._FIRE
        yield f"lapicque-{reset}", Equations(text, ("mem",), membrane="mem"), False
    everything = """
        y = abs(v - x) / (1 + relu(v)) - log(exp(a) + 2) * -x
        s = spike(y - 0.5) * above(v)
        v = y - detach(s) * a / b
        a = exp(-a * a) + s
    """
    yield "everything", Equations(everything, ("v", "a")), False


CASES = {name: (spec, recurrent) for name, spec, recurrent in library_equations()}


@pytest.mark.parametrize("name", CASES)
def test_neurons_by_equations(name):
    spec, recurrent = CASES[name]
    if name == "everything":  # exp and log of torch and of a kernel may differ in their last bit
        compare(spec, Surrogate("triangle", (0.3,)), torch.float64, recurrent, True, exact=False)
        return
    for dtype, per_neuron in ((torch.float64, True), (torch.float64, False), (torch.float32, True)):
        compare(spec, Surrogate("triangle", (0.3,)), dtype, recurrent, per_neuron)


# --- modules ---

BY_AUTOGRAD = {"norse-ex": "exp or log", "norse-adex-recurrent": "exp or log"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", [n for n in NETWORKS if n != "own-neuron"])
def test_modules_by_kernel_are_the_modules(name, dtype):
    """Spikes, states and outputs bit by bit; and every layer says which way it went."""
    net, x = build(name, dtype), inputs(dtype=dtype, T=12)
    with torch.no_grad():
        plain = states_after(net, x)
    with eprop.EProp(net, **options(net)) as learner:
        watched = states_after(net, x, learner)
        kernels = [layer.neuron.kernel for layer in learner.layers if layer.neuron is not None]
        assert sum(layer.pending[-1].place is not None for layer in learner.layers) == sum(
            not kernel.why_not for kernel in kernels
        )
    for own, expected in zip(watched, plain, strict=True):
        assert torch.equal(own, expected)
    reasons = [kernel.why_not for kernel in kernels if kernel.why_not]
    expected = BY_AUTOGRAD.get(name)
    assert len(reasons) == (expected is not None)
    assert all(expected in why for why in reasons)


def states_after(net, x, learner=None):
    found, state = [], None
    for now in x:
        y, state = net(now, state)
        found += [y.detach(), *(s.detach() for s in floats(state))]
        if learner is not None:
            learner.step(loss_of(y))
    return found


@pytest.mark.parametrize("what", ["beta", "threshold", "surrogate", "in place"])
def test_a_neuron_that_is_changed_in_a_chunk_is_described_anew(what, monkeypatch):
    """Derivatives are those of the step: half of the chunk has another parameter than the rest."""

    def run(by_kernel):
        torch.manual_seed(0)
        net, x = SnnNet(snn.Leaky(beta=0.9, spike_grad=spike), silent_leaky()).double(), inputs(T=16)
        with torch.no_grad():
            net.fc1.weight.mul_(4)
        with monkeypatch.context() as patch, eprop.EProp(net, chunk=64) as learner:
            if not by_kernel:
                patch.setattr(type(learner.hidden[0].neuron), "later", lambda self: False)
            _, state = loop(net, x[:7], learner.step)
            if what == "surrogate":
                net.hidden.spike_grad = Surrogate("triangle", (2.0,))
            elif what == "in place":
                net.hidden.beta.fill_(0.5)
            else:
                setattr(net.hidden, what, torch.tensor(0.5, dtype=torch.float64))
            loop(net, x[7:], learner.step, state)
            assert len({id(r.place.block) for r in learner.hidden[0].pending if r.place}) == (
                2 if by_kernel else 0
            )
            learner.flush()
        return grads(net)

    expected, found = run(False), run(True)
    for name, grad in expected.items():
        assert (found[name] - grad).norm() <= 1e-12 * grad.norm(), name


@pytest.mark.parametrize("cell", [norse.LIFCell, norse.LSNNCell])
def test_a_state_of_another_batch_never_reaches_the_kernel(cell):
    net = norse.SequentialState(nn.Linear(M, N), cell(), nn.Linear(N, C), norse.LICell())
    with eprop.EProp(net) as learner:
        _, state = loop(net, inputs(T=3, B=4, dtype=torch.float32), learner.step)
        with pytest.raises(RuntimeError, match="must match|samples"):
            net(torch.ones(3, M), state)


def test_an_attribute_that_changes_nothing_leaves_the_kernel_as_it_is():
    net, x = build("rleaky"), inputs(T=8)
    expected = oracle(net, x)
    with eprop.EProp(net) as learner:

        def step(loss):
            net.hidden.last_loss = loss.detach()  # as a probe might
            learner.step(loss)

        loop(net, x, step)
        assert len({id(r.place.block) for r in learner.hidden[0].pending}) == 1
        learner.flush()
    for name, grad in grads(net).items():
        assert (grad - expected[name]).norm() <= 1e-12 * expected[name].norm(), name


def test_batches_of_another_size_are_taken():
    net = build("rsynaptic")
    with eprop.EProp(net, chunk=5) as learner:
        for size in (4, 2, 4):
            x = inputs(B=size)
            net.zero_grad(), learner.reset()
            loop(net, x, learner.step)
            learner.flush()
            found = grads(net)
            expected = None
            learner._stack.close()  # the plain model, for a moment
            expected = oracle(net, x)
            learner._stack = None
            learner.__enter__()
            for name, grad in expected.items():
                assert (found[name] - grad).norm() <= 1e-12 * grad.norm(), name


def test_neurons_that_do_something_of_their_own_go_by_autograd():
    class Noted(snn.Leaky):
        def forward(self, x, mem=None):
            return super().forward(2 * x, mem)

    net, x = SnnNet(Noted(beta=0.9, spike_grad=spike), silent_leaky()).double(), inputs()
    with eprop.EProp(net, neurons=[net.hidden], readout=net.readout) as learner:
        loop(net, x, learner.step)
        kernel = learner.hidden[0].neuron.kernel
        assert kernel is None or "overrides forward" in kernel.why_not
    for name, grad in oracle(net, x).items():
        assert (learned(net, x)[name] - grad).norm() <= 1e-12 * grad.norm(), name


# --- what a loss may use of a readout ---


class SpikingReadout(SnnNet):
    """The loss may use the readout's spikes, its membrane, or both."""

    def forward(self, x, state=None):
        if state is None:
            self.hidden.reset_mem(), self.readout.reset_mem()
        first, second = (None, None) if state is None else state
        spikes, first = self.hidden(self.fc1(x), first)
        out, second = self.readout(self.fc2(spikes), second)
        return torch.cat([3 * out, second], -1), (first, second)


def test_a_loss_of_the_readouts_spikes_and_membrane():
    net = SpikingReadout(
        snn.Leaky(beta=0.9, spike_grad=spike), snn.Leaky(beta=0.8, spike_grad=spike, threshold=0.3)
    ).double()
    with torch.no_grad():
        net.fc1.weight.mul_(4), net.fc2.weight.mul_(4)
    x = inputs()
    expected = oracle(net, x)
    for name, grad in learned(net, x, chunk=5).items():
        assert (grad - expected[name]).norm() <= 1e-12 * expected[name].norm(), name


@pytest.mark.parametrize("steps", [1, 3])
def test_a_loss_of_another_state_of_the_readout_is_refused(steps):
    net = norse.SequentialState(nn.Linear(M, N), norse.LIFCell(), nn.Linear(N, C), norse.LICell())
    with eprop.EProp(net) as learner:
        state = None
        for now in inputs(T=steps, dtype=torch.float32):
            y, state = net(now, state)
            loss = loss_of(y) if len(learner.readout.pending) < steps - 1 else state[3].i.sum()
            if len(learner.readout.pending) == steps - 1:
                with pytest.raises(UnsupportedError, match="state of readout 3"):
                    learner.step(loss)
                return
            learner.step(loss)


def test_a_description_is_the_adapters():
    cell = norse.LIFCell()
    found = described(cell, adapter_of(cell), readout=False)
    assert isinstance(found, Neuron)
    assert set(equations(found).program.params) <= set(parameters(found))
    assert "exp" in described(norse.LIFExCell(), adapter_of(cell), readout=False)
    custom = snn.Leaky(beta=0.9, spike_grad=lambda x: (x > 0).float())
    assert "spike function" in described(custom, adapter_of(custom), readout=False)


# --- every neuron of both libraries, with every option ---


class AnyNeuron(nn.Module):
    """Linear, a neuron of either library with its state, Linear."""

    def __init__(self, neuron, inside):
        super().__init__()
        self.first = nn.Identity() if inside else nn.Linear(M, 4)
        self.neuron, self.out = neuron, nn.Linear(4, C)

    def forward(self, x, state=None):
        current = self.first(x)
        if not isinstance(self.neuron, snn.SpikingNeuron):
            z, state = self.neuron(current, state)
            return self.out(z), state
        if state is None:
            for name in self.neuron._non_persistent_buffers_set:
                setattr(self.neuron, name, torch.zeros(0))
        found = self.neuron(current)
        return self.out(found[0] if isinstance(found, tuple) else found), ()


TAKEN = ["Leaky", "Synaptic", "RLeaky", "RSynaptic", "Alpha", "Lapicque"]
NOT_TAKEN = ("LIFMC", "Coba", "LIFCorrelation", "LICell", "LILinear", "LIBox")
BY_FUNCTION = (
    "state_quant",
    "graded_spikes_factor",
    "learn_graded_spikes_factor",
    "adjoint",
    "reset_method=own function",
)


def zoo():
    for adapter in (SnnTorchAdapter(), NorseAdapter()):
        for name, example in adapter.examples().items():
            known = (
                name in TAKEN
                if adapter.name == "snntorch"
                else name != "LI" and not name.startswith(NOT_TAKEN)
            )
            for label in ("", *example.options) if known else ():
                marks = [pytest.mark.slow] if label else []
                yield pytest.param(name, example, label, marks=marks, id=f"{name}-{label}".rstrip("-"))


@pytest.mark.parametrize(("kind", "example", "label"), list(zoo()))
def test_kernels_and_autograd_agree_on_every_neuron(kind, example, label, monkeypatch):
    def make():
        torch.manual_seed(1)
        neuron = example.with_option(label) if label else example.build()
        return AnyNeuron(neuron, getattr(neuron, "input_weights", None) is not None)

    try:
        neuron = make()
    except (TypeError, ValueError) as error:
        pytest.skip(f"raises upstream: {error}")
    x = 3 * torch.rand(9, 3, M, generator=torch.Generator().manual_seed(0))
    x = x[..., :4] if isinstance(neuron.first, nn.Identity) else x
    steps = x.split(3) if adapter_of(neuron.neuron).takes_sequence(neuron.neuron) else x

    def run(by_kernel):
        net = make()
        with monkeypatch.context() as patch, eprop.EProp(net, chunk=4, readout=net.out) as learner:
            if not by_kernel:
                patch.setattr(watch.Neuron, "later", lambda self: False)
            state = None
            for now in steps:
                y, state = net(now, state)
                learner.step(loss_of(y))
            kernel = learner.hidden[0].neuron.kernel
            learner.flush()
        return grads(net), "" if kernel is None else kernel.why_not

    if label in ("inhibition", "all_to_all", "conv2d_channels", "record_states"):
        with pytest.raises(UnsupportedError):
            run(True)
        return
    if kind in ("RLeaky", "RSynaptic") and label == "reset_mechanism=zero":
        return  # upstream runs the recurrence twice, which is more than autograd's way takes; its oracle is elsewhere
    try:
        neuron(steps[0])
    except (TypeError, ValueError) as error:
        pytest.skip(f"raises upstream: {error}")
    (expected, _), (found, why) = run(False), run(True)
    assert bool(why) == (
        "Ex" in kind or label in BY_FUNCTION or (kind, label) == ("RSynaptic", "reset_delay")
    ), why
    for name, grad in expected.items():
        assert (found[name] - grad).norm() <= 1e-5 * max(1e-3, grad.norm()), name
