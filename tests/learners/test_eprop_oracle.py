"""The learner's gradient equals ordinary backward of the network with its spikes detached."""

import pytest
import torch
from eprop_cases import NETWORKS, SEQUENCES, build, grads, inputs, learned, loop, loss_of, options, oracle
from helpers import relative

from snn_sparse_plugin.learners import eprop


def compare(found, expected, bound):
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        assert grad.norm() > 0, f"{name} has no gradient: the test shows nothing"
        assert relative(found[name], grad) < bound, name


@pytest.mark.parametrize("engine", ["step", "chunk"])
@pytest.mark.parametrize("name", NETWORKS)
def test_equals_detached_backward(name, engine):
    net, x = build(name), inputs()
    compare(learned(net, x, engine=engine, chunk=5), oracle(net, x), 1e-12)


@pytest.mark.parametrize("name", SEQUENCES)
def test_sequence_modules_equal_detached_backward(name):
    net, x = build(name), inputs()
    with eprop.detached(net):
        y, _ = net(x)
        sum(loss_of(now) for now in y).backward()
    expected = grads(net)
    net.zero_grad()
    with eprop.EProp(net, chunk=5) as learner:
        state = None
        for block in x.split(4):  # a step of the learner may be several of the network
            y, state = net(block, state)
            learner.step(sum(loss_of(now) for now in y))
        learner.flush()
    compare(grads(net), expected, 1e-12)


@pytest.mark.parametrize("name", ["leaky-subtract", "rleaky", "norse-lif-recurrent", "lsnn"])
def test_float32(name):
    net, x = build(name, torch.float32), inputs(dtype=torch.float32)
    expected = oracle(net, x)
    for engine in ("chunk", "offline", "step"):
        compare(learned(net, x, engine=engine, chunk=5), expected, 1e-5)


def test_offline_keeps_no_traces():
    net, x = build("lsnn"), inputs()
    expected = oracle(net, x)
    with eprop.EProp(net, engine="offline") as learner:
        loop(net, x, learner.step)
        learner.flush()
        assert not any(
            s.per_synapse or s.per_input for layer in learner.layers for s in layer.synapses.values()
        )
    compare(grads(net), expected, 1e-12)


def test_spikes_and_outputs_are_those_of_the_plain_model():
    for name in NETWORKS:
        net, x = build(name), inputs(T=9)
        with torch.no_grad():
            plain, state = [], None
            for now in x:
                y, state = net(now, state)
                plain.append(y)
        watched = []
        with eprop.EProp(net, **options(net)) as learner:
            state = None
            for now in x:
                y, state = net(now, state)
                learner.step(loss_of(y))
                watched.append(y.detach())
        assert torch.equal(torch.stack(watched), torch.stack(plain)), name


# --- negative controls: what a wrong rule would do must be far outside the bound ---


def wrong(net, x, break_rule):
    """The largest relative difference to the oracle, with the rule broken by ``break_rule(learner)``."""
    expected = oracle(net, x)
    with eprop.EProp(net, chunk=5) as learner:
        break_rule(learner)
        loop(net, x, learner.step)
        learner.flush()
    found = grads(net)
    return max(relative(found[name], expected[name]) for name in expected)


def test_a_dropped_kappa_shows():
    net, x = build("lsnn"), inputs()
    expected = oracle(net, x)
    found = learned(net, x, kappa=0.0, chunk=5)
    assert relative(found["layers.0.input_weights"], expected["layers.0.input_weights"]) > 1e-3


@pytest.mark.parametrize("which", ["per_input", "per_synapse"])
def test_a_dropped_carry_shows(which):
    def break_rule(learner):
        for layer in learner.layers:
            process = layer.process

            def forget(carry, layer=layer, process=process):
                process(carry)
                for synapses in layer.synapses.values():
                    setattr(synapses, which, {})

            layer.process = forget

    assert wrong(build("lsnn"), inputs(), break_rule) > 1e-3


def test_a_trace_one_step_late_shows():
    def break_rule(learner):
        for layer in learner.layers:
            given = layer._inputs

            def late(records, like, given=given):
                for synapses, x in given(records, like):
                    yield synapses, torch.cat([torch.zeros_like(x[:1]), x[:-1]])

            layer._inputs = late

    assert wrong(build("lsnn"), inputs(), break_rule) > 1e-3


def test_traces_mixed_over_the_batch_show():
    def break_rule(learner):
        for layer in learner.layers:
            process = layer.process

            def mix(carry, layer=layer, process=process):
                process(carry)
                for synapses in layer.synapses.values():
                    for traces in (synapses.per_input, synapses.per_synapse):
                        for key, trace in traces.items():
                            traces[key] = trace.mean(0, keepdim=True).expand_as(trace).clone()

            layer.process = mix

    assert wrong(build("lsnn"), inputs(), break_rule) > 1e-3
