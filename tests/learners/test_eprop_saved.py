"""A learner takes a saved state wholly or not at all: kernels index with its shapes."""

import copy

import pytest
import torch
from test_eprop_learner import build, inputs, learned, loop, loss_of

from snn_sparse_plugin import ConfigError, InputError
from snn_sparse_plugin.learners import eprop


@pytest.fixture(scope="module", params=["lsnn", "leaky-zero", "lsnn-masked"])
def saved(request):
    """A model, its input and a state from the middle of it."""
    torch.manual_seed(0)
    net, x = build(request.param), inputs(T=24)
    with eprop.EProp(net, chunk=5, feedback="random", generator=torch.Generator().manual_seed(1)) as learner:
        _, hidden = loop(net, x[:13], learner.step)
        return net, x, learner.state_dict(), hidden


def hidden_layer(state):
    return next(layer for layer in state["layers"].values() if layer["synapses"])


def synapses(state):
    return next(iter(hidden_layer(state)["synapses"].values()))


def traces(state):
    found = synapses(state)
    return next(kind for kind in (found["per_input"], found["per_synapse"]) if kind)


def replaced(where, change):
    name = next(iter(where))
    where[name] = change(where[name])


CHANGES = {
    "no filter": lambda s: s.pop("filter"),
    "a filter of another shape": lambda s: s.update(filter=s["filter"]._replace(A=torch.ones(3, 3))),
    "a filter without such a component": lambda s: s.update(filter=s["filter"]._replace(out=7)),
    "a filter that is a tuple": lambda s: s.update(filter=tuple(s["filter"])),
    "signals to other layers": lambda s: s.update(indirect={"other"}),
    "one entry more": lambda s: s.update(more=1),
    "steps that are text": lambda s: s.update(steps_seen="13"),
    "negative steps": lambda s: s.update(steps_seen=-1),
    "another batch": lambda s: s.update(batch=s["batch"] + 1),
    "feedback of another shape": lambda s: replaced(s["feedback"]["matrices"], lambda m: m[:1].clone()),
    "feedback of another weight": lambda s: s["feedback"]["matrices"].update(other=torch.ones(2, 2)),
    "no feedback": lambda s: s.update(feedback=None),
    "a layer without synapses": lambda s: hidden_layer(s).pop("synapses"),
    "a layer that is a list": lambda s: replaced(s["layers"], lambda _: []),
    "synapses of an unknown weight": lambda s: hidden_layer(s)["synapses"].update(other=synapses(s)),
    "synapses of another shape": lambda s: synapses(s).update(shape=(3, 1000)),
    "traces of fewer samples": lambda s: replaced(traces(s), lambda t: t[:1].clone()),
    "traces of fewer inputs": lambda s: replaced(traces(s), lambda t: t[..., :1].clone()),
    "traces that are numbers": lambda s: replaced(traces(s), lambda _: 1.0),
    "traces that are sparse": lambda s: replaced(traces(s), torch.Tensor.to_sparse),
    "traces of a state by name": lambda s: traces(s).update(v=next(iter(traces(s).values()))),
    "synapses outside the matrix": lambda s: synapses(s).update(
        exists=(torch.tensor([10**6]), torch.tensor([0])), per_input={}, per_synapse={}
    ),
    "a gradient of another shape": lambda s: synapses(s).update(grad=torch.ones(1)),
    "a rate that is text": lambda s: hidden_layer(s).update(rate="high"),
    "a buffer of no module": lambda s: s["buffers"].update({"nothing.mem": torch.ones(1)}),
    "buffers that are none": lambda s: s.update(buffers=None),
    "compiled parts that are text": lambda s: s.update(compiled=[{"y": "0"}]),
}


def learner_of(net):
    return eprop.EProp(net, chunk=5, feedback="random", generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("what", CHANGES)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(saved, what):
    net, x, state, hidden = saved
    wrong = copy.deepcopy(state)
    CHANGES[what](wrong)
    with learner_of(net) as learner:
        learner.load_state_dict(state)
        before = learner.state_dict()
        with pytest.raises(InputError, match="the state given to EProp.load_state_dict is not one") as error:
            learner.load_state_dict(wrong)
        assert len(str(error.value).splitlines()) == 1
        assert learner.steps_seen == before["steps_seen"] == 13
        loop(net, x[13:], learner.step, hidden)  # goes on from the state that it had
        learner.flush()
    net.zero_grad()


@pytest.mark.parametrize("state", [None, 3, {}, {"layers": 1}, {"layers": {"other": {}}}])
def test_what_is_no_state(saved, state):
    with learner_of(saved[0]) as learner, pytest.raises((InputError, ConfigError)):
        learner.load_state_dict(state)


def test_traces_of_kernels_that_do_not_fit_leave_a_learner_that_begins_anew():
    net, x = build("lsnn"), inputs(T=24)
    with eprop.EProp(net, chunk=5) as learner:
        learner.run(x[:13], lambda y, _: loss_of(y))
        state = learner.state_dict()
    wrong = copy.deepcopy(state)
    wrong["compiled"][0]["v"] = wrong["compiled"][0]["v"][:1].clone()
    net.zero_grad()
    with eprop.EProp(net, chunk=5) as learner:
        with pytest.raises(InputError, match="other shapes"):
            learner.load_state_dict(wrong)
        assert learner.steps_seen == 0
        learner.run(x, lambda y, _: loss_of(y))
        learner.flush()
    found = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    expected = learned(net, x, chunk=5)
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-6)
