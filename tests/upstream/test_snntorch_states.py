"""Hidden and explicit states of every class: calls and resets are upstream's, and so are its oddities."""

from __future__ import annotations

import pytest
import torch
from snntorch_cases import (
    STEPPED,
    B,
    N,
    assert_same,
    equal,
    every_class,
    every_stepped,
    every_way,
    explicit_steps,
    face,
    observe,
    outcome,
    snntorch,
    steps,
)
from torch import nn

from snntorch import utils  # isort: skip
from snn_sparse_plugin import restore  # isort: skip


def hidden_of(module):
    """Every hidden state, also those that DeltaLeaky keeps as plain attributes."""
    names = (*module._non_persistent_buffers_set, *(["mem_prev"] if hasattr(module, "mem_prev") else []))
    return {name: getattr(module, name) for name in sorted(names)}


def assert_same_hidden(ours, theirs):
    ours, theirs = hidden_of(ours), hidden_of(theirs)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        expected = theirs[name]
        assert (value is None) == (expected is None), name
        assert value is None or (equal(value, expected) and value.requires_grad == expected.requires_grad), (
            name
        )


def run_hidden(way, case, **options):
    """Twins after a run with their state inside: (ours, plain upstream)."""
    theirs = case.hidden(**options)
    steps(theirs, case, case.inputs().requires_grad_())
    ours = way.ready(case.hidden(way.library, **options))
    with way.on():
        steps(ours, case, case.inputs().requires_grad_())
    return ours, theirs


@every_way
@every_stepped
class TestCalls:
    def test_explicit_state(self, case, way):
        theirs = observe(case.build(), case, explicit_steps)
        with way.on():
            ours = observe(way.ready(case.build(way.library)), case, explicit_steps)
        assert_same(ours, theirs)

    def test_a_given_state_gets_its_gradient(self, case, way):
        def grads(module):
            state = case.zeros()
            leaves = [s.requires_grad_() for s in torch.utils._pytree.tree_leaves(state)]
            outs = explicit_steps(module, case, case.inputs(), state)
            loss = sum(o[0].sum() for o in outs)
            return torch.autograd.grad(loss, leaves, allow_unused=True)

        expected = grads(case.build())
        with way.on():
            got = grads(way.ready(case.build(way.library)))
        assert any(g is not None and g.abs().sum() > 0 for g in expected)
        for a, b in zip(got, expected, strict=True):
            assert (a is None) == (b is None)
            assert a is None or torch.allclose(a, b, rtol=1e-5, atol=1e-7)

    def test_without_a_state(self, case, way):
        expected = outcome(lambda: case.build()(case.inputs()[0]))
        with way.on():
            got = outcome(lambda: way.ready(case.build(way.library))(case.inputs()[0]))
        assert got[0] == expected[0]
        if got[0]:
            assert got[1] == expected[1]
        else:
            assert all(equal(a, b) for a, b in zip(got[1], expected[1], strict=True))

    def test_a_state_beside_a_hidden_one_is_refused(self, case, way):
        expected = outcome(lambda: explicit_steps(case.hidden(), case, case.inputs()[:1]))
        with way.on():
            got = outcome(
                lambda: explicit_steps(way.ready(case.hidden(way.library)), case, case.inputs()[:1])
            )
        assert got[0] == expected[0] == ("" if case.name == "DeltaLeaky" else "TypeError")
        assert got[0] == "" or got[1] == expected[1]

    def test_another_batch_size_in_between(self, case, way):
        def run(module):
            x = case.inputs()
            return [out for h in (x[0], x[1], x[2][:2]) for out in [module(h)]]

        error, expected = outcome(lambda: run(case.hidden()))
        with way.on():
            failed, got = outcome(lambda: run(way.ready(case.hidden(way.library))))
        assert failed == error
        if error:
            assert got == expected
        else:
            flatten = torch.utils._pytree.tree_leaves
            assert all(equal(a, b) for a, b in zip(flatten(got), flatten(expected), strict=True))

    def test_the_state_inside_carries_the_graph(self, case, way):
        ours, theirs = run_hidden(way, case)
        assert_same_hidden(ours, theirs)
        assert any(s.requires_grad for s in hidden_of(ours).values())


@every_way
@every_stepped
class TestResets:
    def test_reset_mem(self, case, way):
        ours, theirs = run_hidden(way, case)
        got, expected = ours.reset_mem(), theirs.reset_mem()
        assert type(got) is type(expected)
        assert_same_hidden(ours, theirs)

    def test_deprecated_init(self, case, way):
        ours, theirs = run_hidden(way, case)
        got, expected = getattr(ours, case.init)(), getattr(theirs, case.init)()
        assert type(got) is type(expected)
        assert_same_hidden(ours, theirs)
        fresh = way.ready(case.build(way.library))
        state = getattr(fresh, case.init)()
        if case.name != "DeltaLeaky":  # its reset returns a pair of None
            state = state if isinstance(state, tuple) else (state,)
            assert [s.shape for s in state] == [(0,)] * len(case.states)

    @pytest.mark.parametrize("method", ["reset_hidden", "detach_hidden"])
    def test_of_the_class(self, case, way, method):
        expected = case_outcome(case, method, snntorch)
        got = case_outcome(case, method, way.library, way)
        assert got[0] == expected[0]
        if got[0] == "":
            assert_same_hidden(got[1], expected[1])
        else:
            assert got[1] == expected[1]

    def test_utils_reset(self, case, way):
        def run(module):
            net = nn.Sequential(module)
            steps(net, case, case.inputs().requires_grad_())
            snntorch.SpikingNeuron.instances[:] = [module]
            utils.reset(net)
            return module

        error, theirs = outcome(lambda: run(case.hidden()))
        with way.on():
            failed, ours = outcome(lambda: run(way.ready(case.hidden(way.library))))
        assert failed == error
        assert_same_hidden(ours, theirs)
        left = [name for name, s in hidden_of(ours).items() if s is not None and s.abs().sum() > 0]
        assert left == {"RSynaptic": ["spk"], "DeltaLeaky": ["mem_prev"]}.get(case.name, [])


def case_outcome(case, method, library, way=None):
    """What a class method does to one live neuron: -> (kind of error, the neuron or the message)."""
    snntorch.SpikingNeuron.instances.clear()
    module = case.hidden(library)
    if way is None:
        steps(module, case, case.inputs().requires_grad_())
    else:
        way.ready(module)
        with way.on():
            steps(module, case, case.inputs().requires_grad_())

    def run():
        getattr(getattr(library, case.name), method)()
        return module

    return outcome(run)


@every_way
class TestEveryInstance:
    """Upstream resets every neuron of the process, a nested one only with the others of its class."""

    def test_all_networks_are_reset(self, way):
        case = STEPPED["Leaky"]
        first, second = (way.ready(case.hidden(way.library)) for _ in range(2))
        plain = case.hidden()
        with way.on():
            for module in (first, second, plain):
                module(case.inputs()[0])
        utils.reset(nn.Sequential(first))
        assert all(m.mem.abs().sum() == 0 for m in (first, second, plain))

    def test_a_nested_neuron_alone_is_not_found(self, way):
        case = STEPPED["Leaky"]
        module = way.ready(case.hidden(way.library))
        with way.on():
            module(case.inputs()[0])
        utils.reset(nn.Sequential(nn.Sequential(module)))
        assert module.mem.abs().sum() > 0

    def test_a_live_delta_leaky_breaks_the_reset_of_others(self, way):
        delta = way.ready(STEPPED["DeltaLeaky"].hidden(way.library))
        assert delta in snntorch.SpikingNeuron.instances
        leaky = way.ready(STEPPED["Leaky"].hidden(way.library))
        with pytest.raises((AttributeError, TypeError)):
            utils.reset(nn.Sequential(leaky))

    @every_class
    def test_is_listed_once(self, case, way):
        module = way.ready(case.hidden(way.library))
        listed = [m for m in snntorch.SpikingNeuron.instances if m is module]
        assert len(listed) == (case.name != "LeakyParallel")
        restore(module)
        assert [m for m in snntorch.SpikingNeuron.instances if m is module] == listed

    @every_class
    def test_init_empties_the_list_that_upstream_would(self, case, way):
        module = way.ready(case.hidden(way.library))
        cls = type(module)
        if case.name == "LeakyParallel":
            assert not hasattr(cls, "init")
            return
        cls.init()  # upstream's own: a list of this class hides the common one
        try:
            assert cls.instances == []
            assert module in snntorch.SpikingNeuron.instances
        finally:
            del cls.instances


def test_the_state_of_a_rectangular_slstm_is_wiped_as_upstream_does():
    def run(library):
        torch.manual_seed(0)
        net = library.SLSTM(5, N, init_hidden=True, output=True, threshold=0.05)
        x = torch.randn(5, B, 5)
        return [net(h)[2] for h in x], net(x[0])[2]

    (got, again), (expected, expected_again) = run(face), run(snntorch)
    assert all(equal(a, b) for a, b in zip(got, expected, strict=True))
    assert equal(again, expected_again)
    assert equal(again, got[0])  # the state did not survive the step


def test_the_reset_setter_leaves_the_reset_function_as_it_was():
    for library in (snntorch, face):
        neuron = library.Leaky(0.9, init_hidden=True, output=True)
        neuron.reset_mechanism = "zero"
        assert int(neuron.reset_mechanism_val) == 1
        assert neuron.state_function.__func__ is snntorch.Leaky._base_sub
