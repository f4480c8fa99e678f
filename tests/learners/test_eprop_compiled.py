"""E-prop of unmodified models made fast: derivatives of many steps at once, a compiled scan, sums over events."""

import pytest
import snntorch as snn
import torch
from eprop_cases import (
    NETWORKS,
    M,
    Mixed,
    N,
    SnnNet,
    build,
    compare,
    grads,
    inputs,
    learned,
    loop,
    loss_of,
    oracle,
    silent_leaky,
)
from eprop_scan_cases import ScanTests
from helpers import on_grid, relative, spikes
from torch import nn

from snn_sparse_plugin import UnsupportedError
from snn_sparse_plugin.backends.cpu import eprop_chunk
from snn_sparse_plugin.learners import eprop
from snn_sparse_plugin.learners.eprop import scan, watch
from snn_sparse_plugin.learners.eprop.rule import ChunkRule
from snn_sparse_plugin.learners.eprop.synapses import Synapses

# upstream runs the recurrence of these twice in a step, which only their equations say
TWICE = ("rleaky-zero", "rsynaptic-zero")
AT_ONCE = [
    name for name in NETWORKS if name not in ("own-neuron", "recurrence-outside", "lsnn-two-layers", *TWICE)
]


class TestScanOnCpu(ScanTests):
    device = "cpu"

    @staticmethod
    def kernel(steps, readout, lanes):
        assert scan.on_cpu(steps.filtered)
        return scan.scan(steps, readout, lanes)


@pytest.mark.parametrize("name", AT_ONCE)
def test_derivatives_of_many_steps_equal_those_of_each(name, monkeypatch):
    net, x = build(name), inputs()
    with monkeypatch.context() as patch:
        patch.setattr(watch.Neuron, "later", lambda self: False)  # autograd at every step
        expected = learned(net, x, chunk=6)
    counted = []
    before = watch.replay

    def count(*args):
        counted.append(len(args[3]))
        return before(*args)

    monkeypatch.setattr(watch, "replay", count)
    monkeypatch.setattr(watch.Neuron, "_by_kernel", lambda *args: None)
    compare(learned(net, x, chunk=6), expected)
    assert sum(counted) >= len(x) - 1, "no derivative was found later: the test shows nothing"


@pytest.mark.parametrize("p", [0.05, 0.9])
@pytest.mark.parametrize("graded", [False, True])
@pytest.mark.parametrize("carry", [True, False])
def test_sums_over_events_equal_products(p, graded, carry, monkeypatch):
    torch.manual_seed(0)
    K, B, n, m = 6, 3, 5, 11
    shape = K, B, n
    entry = lambda: 0.5 * torch.randn(shape, dtype=torch.float64)  # noqa: E731
    local = {
        (0, 0): entry(),
        (0, 1): entry(),
        (0, 2): entry(),
        (1, 1): 0.8,
        (1, 0): 0.5,
        (2, 2): entry(),
        (2, 1): 0.3,
    }
    readout = scan.Filter(torch.tensor([[0.9]], dtype=torch.float64), torch.ones(1, dtype=torch.float64))

    def found(events):
        torch.manual_seed(1)
        rule, synapses = ChunkRule(readout), Synapses((n, m), None, None)
        with monkeypatch.context() as patch:
            if not events:
                patch.setattr("snn_sparse_plugin.learners.eprop.rule.on_cpu", lambda x: False)
            patch.setattr("snn_sparse_plugin.learners.eprop.rule._DENSE", 2.0)
            for chunk in range(3):
                x = (torch.rand(K, B, m) < p).double()
                x = x * torch.randn(K, B, m, dtype=torch.float64) if graded else x
                steps = scan.Steps(local, 2, entry(), entry())
                rule.process(steps, [0, 1], [(synapses, x)], carry or chunk < 2)
        assert synapses.per_input.keys() == {0}
        assert synapses.per_synapse.keys() == {1, ~0}
        return synapses

    by_events, by_products = found(True), found(False)
    assert relative(by_events.take(), by_products.take()) < 1e-13
    for component, trace in by_products.per_synapse.items():
        assert relative(by_events.per_synapse[component], trace) < 1e-13


def test_traces_go_from_events_to_products_and_back():
    net, x = build("leaky-zero"), inputs(T=24)
    x[6:12] = torch.rand(6, *x.shape[1:], dtype=x.dtype)  # a dense chunk
    compare(learned(net, x, chunk=6), oracle(net, x))


def test_memory_of_traces_is_used_again_and_holds_nothing_old():
    net, x = build("leaky-zero"), inputs()
    expected = oracle(net, x)
    with eprop.EProp(net, chunk=5) as learner:
        for _ in range(2):
            net.zero_grad()
            learner.reset()
            loop(net, x, learner.step)
            learner.flush()
            found = grads(net)
            block = learner.hidden[0].synapses["fc1.weight"]._block.data_ptr()
        assert block == learner.hidden[0].synapses["fc1.weight"]._block.data_ptr()
    compare(found, expected)


def test_a_random_neuron_is_refused():
    class Rare(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return (torch.rand_like(x) < 0.5).to(x.dtype)

        @staticmethod
        def backward(ctx, grad):
            return grad

    net, x = SnnNet(snn.Leaky(beta=0.9, spike_grad=Rare.apply), silent_leaky()), inputs(dtype=torch.float32)
    with (
        pytest.raises(UnsupportedError, match="same spikes from the same current"),
        eprop.EProp(net) as learner,
    ):
        loop(net, x, learner.step)


def written_to(net, x, chunk):
    """A state is doubled in place after three steps."""
    with eprop.EProp(net, chunk=chunk) as learner:
        _, (layer, out) = loop(net, x[:3], learner.step)
        state = type(layer)(*(part.detach() for part in layer)), out
        loop(net, x[3:5], learner.step, state)
        state[0].v.mul_(2)  # the fourth step was made from it
        learner.flush()
    return grads(net)


def test_a_state_written_to_in_place_is_refused_where_steps_run_again(monkeypatch):
    net, x = build("lsnn"), inputs()
    expected = written_to(net, x, chunk=1)
    net.zero_grad()
    compare(written_to(net, x, chunk=64), expected)  # a kernel has found the derivatives before
    monkeypatch.setattr(watch.Neuron, "_by_kernel", lambda *args: None)
    with pytest.raises(UnsupportedError, match="written to in place"):
        written_to(net, x, chunk=64)


@pytest.mark.parametrize("way", ["whole", "part", "elsewhere"])
def test_an_input_written_to_in_place_is_refused(way):
    net, x = build("lsnn"), inputs()
    expected = learned(net, x, chunk=8)
    space = torch.zeros_like(x)
    with eprop.EProp(net, chunk=8) as learner:
        state = None
        if way == "elsewhere":  # one tensor is filled as the steps go on: each finds what it was given
            for t, now in enumerate(x):
                space[t] = now
                y, state = net(space[t], state)
                learner.step(loss_of(y))
            learner.flush()
            compare(grads(net), expected)
            return
        given = space[0].clone() if way == "whole" else space[0]

        def same_tensor(now):
            given.copy_(now)
            return given

        with pytest.raises(UnsupportedError, match="received was written to in place"):
            loop(net, map(same_tensor, x), learner.step)


class Late(Mixed):
    """The recurrence begins with the second step and ends with the seventh; the current may double at some step."""

    def __init__(self):
        super().__init__()
        self.doubled = 99

    def forward(self, x, state=None):
        if state is None:
            self.lif.reset_mem()
            current, mem, step = self.fc1(x), None, 0
        else:
            spikes, mem, step = state
            current = self.fc1(x) + self.rec(spikes) if step < 7 else self.fc1(x)
        spikes, mem = self.lif(current if step < self.doubled else 2 * current, mem)
        return self.out(spikes), (spikes, mem, step + 1)


@pytest.mark.parametrize("engine", ["step", "chunk", "offline"])
def test_a_recurrence_of_some_steps_only_learns(engine):
    net, x = Late().double(), inputs()
    with torch.no_grad():
        net.fc1.weight.mul_(4)
    expected = oracle(net, x)
    assert expected["rec.weight"].norm() > 0
    compare(learned(net, x, engine=engine, chunk=5), expected)


def test_a_current_that_changes_its_way_later_is_refused():
    net, x = Late().double(), inputs()
    net.doubled = 6
    with (
        pytest.raises(UnsupportedError, match="MulBackward0 stands before it"),
        eprop.EProp(net) as learner,
    ):
        loop(net, x, learner.step)


def test_modules_keep_what_they_hold_when_steps_are_run_again():
    net = nn.Sequential(
        nn.Linear(M, N), snn.Leaky(beta=0.9, init_hidden=True),
        nn.Linear(N, 3), snn.Leaky(beta=0.8, init_hidden=True, reset_mechanism="none", output=True),
    )  # fmt: skip
    with eprop.EProp(net, chunk=4) as learner:
        for now in inputs(T=12, dtype=torch.float32):
            _, y = net(now)
            membrane = net[1].mem.clone()
            learner.step(loss_of(y))
            assert torch.equal(net[1].mem, membrane)


# --- all steps at once, forward and backward ---


@pytest.mark.parametrize(
    "name", ["lsnn", "lsnn-feed-forward", "lsnn-autapses", "lsnn-masked", "lsnn-two-layers"]
)
def test_unroll_equals_the_loop(name):
    net, x = build(name), inputs()
    total, state = loop(net, x[:9])
    more, last = loop(net, x[9:], state=state)
    (total + more).backward()
    expected = grads(net)
    net.zero_grad()
    first, _, state = net.unroll(x[:9])
    second, z, found = net.unroll(x[9:], state)
    sum(loss_of(y) for y in torch.cat([first, second])).backward()
    compare(grads(net), expected)
    assert torch.equal(z[-1][:, :N], last[0].z)
    for own, reference in zip(found[0], last[0], strict=True):
        assert torch.allclose(own, reference, rtol=0, atol=1e-12)


def test_unrolled_spikes_are_bit_equal():
    net = eprop.LSNNNetwork(40, 33, 3, v_th=0.5, refractory=3.0)
    with torch.no_grad():
        net.layers[0].input_weights.copy_(on_grid(33, 40, scale=0.5))
        net.layers[0].recurrent_weights.copy_(on_grid(33, 33, scale=0.5).fill_diagonal_(0))
    x = spikes(30, 3, 40, p=0.2)
    with torch.no_grad():
        _, found, _ = net.unroll(x)
        state, z = None, []
        for now in x:
            _, state = net(now, state)
            z.append(state[0].z)
    assert found.mean() > 0.02
    assert torch.equal(found, torch.stack(z))


def test_the_kernel_takes_any_split_of_samples():
    torch.manual_seed(0)
    steps = torch.randn(4, 7, 5, dtype=torch.float64)
    args = (
        [],
        torch.tensor([[1.0]], dtype=torch.float64),
        torch.tensor([[-1]]),
        torch.zeros(0, 0),
        torch.zeros(0),
    )
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(eprop_chunk.scan(*args, 0, steps, torch.zeros_like(steps), [])[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)
    assert torch.equal(found[0][0], steps)
