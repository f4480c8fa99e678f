"""Why a neuron that can run fused did not: reports and counts name the input, state, mode or option."""

from __future__ import annotations

import copy
import re
from contextlib import suppress

import pytest
import torch
from torch import nn

snntorch = pytest.importorskip("snntorch")
norse = pytest.importorskip("norse.torch")

from snn_sparse_plugin import sparse_mode, sparsify, unroll  # noqa: E402
from snn_sparse_plugin.adapters import MARK, record_of  # noqa: E402
from snn_sparse_plugin.core import tally  # noqa: E402

T, B, N = 5, 2, 4


@pytest.fixture(autouse=True)
def _fresh():
    tally.clear()


def reason(kind):
    (found,) = tally.by_class()[kind].reasons
    return found


class Marked(torch.Tensor):
    """Some subclass."""


SEQUENCES = {
    "integers": (norse.LIF, lambda m, x: m(x.long()), "an input of torch.int64"),
    "sparse": (norse.LIF, lambda m, x: m(x.to_sparse()), "an input of layout torch.sparse_coo"),
    "one step": (norse.LIF, lambda m, x: m(x[0, 0]), r"an input of shape \(4,\)"),
    "double state": (
        norse.LIF,
        lambda m, x: m(x, norse.LIFFeedForwardState(*torch.zeros(2, B, N).double().unbind())),
        "a state or parameter of a higher precision",
    ),
    "wider state": (
        norse.LIF,
        lambda m, x: m(x[:, :1], norse.LIFFeedForwardState(*torch.zeros(2, B, N).unbind())),
        "a state of more samples",
    ),
    "vmap": (
        norse.LIF,
        lambda m, x: torch.func.vmap(lambda y: m(y)[0], in_dims=1)(x),
        "called inside a transform of torch.func",
    ),
}


@pytest.mark.parametrize(("build", "call", "why"), SEQUENCES.values(), ids=SEQUENCES)
def test_a_call_with_all_steps(build, call, why):
    module, x = build(), torch.rand(T, B, N)
    with sparse_mode(), suppress(RuntimeError):  # upstream refuses some of them as well
        call(module, x)
    assert re.match(why, record_of(module).reason), record_of(module).reason


STEPS = {
    "double": (lambda x: x.double(), "an input of torch.float64: step loops of float32 and half precision"),
    "a subclass": (lambda x: x.as_subclass(Marked), "an input of type Marked"),
    "a parameter": (lambda x: nn.Parameter(x), "an input of type Parameter"),
}


@pytest.mark.parametrize(("change", "why"), STEPS.values(), ids=STEPS)
def test_a_step_loop(change, why):
    lif = snntorch.Leaky(0.9, init_hidden=True)
    report = sparsify(lif)
    for x in torch.rand(T, B, N):
        lif(change(x))
    assert reason("Leaky").startswith(why)
    assert "fused" not in report.runs()[""]


def test_a_loop_under_a_hook_of_torch():
    lif = snntorch.Leaky(0.9, init_hidden=True)
    with sparse_mode(), torch.autograd.graph.save_on_cpu():
        for x in torch.rand(T, B, N):
            lif(x)
    assert reason("Leaky").startswith("a mode, transform or hook of torch")


def test_a_one_to_one_recurrence_that_is_too_large():
    lif = snntorch.RLeaky(0.9, all_to_all=False, init_hidden=True)
    lif.reset_mem()
    with sparse_mode():
        for x in torch.rand(T, B, 1025):
            lif(x)
    assert reason("RLeaky") == "a one-to-one recurrence of 1025 neurons, where up to 1024 are fused"


def test_hooks_of_a_layer():
    net = nn.Sequential(nn.Linear(N, N), snntorch.Leaky(0.9, init_hidden=True))
    net[1].register_forward_hook(lambda *_: None)
    unroll(net, torch.rand(T, B, N), fuse_time=True)
    assert record_of(net[1]).reason == "hooks, which run at every step"


def test_the_reason_is_that_of_the_last_call_that_was_refused():
    module, x = norse.LIF(), torch.rand(T, B, N)
    with sparse_mode():
        module(x.to_sparse())
        assert reason("LIF").startswith("an input of layout")
        module(x[..., 0, 0])
        assert reason("LIF").startswith("an input of shape (5,)")
    with sparse_mode(fuse_time=False):
        module(x)
    assert reason("LIF") == "fuse_time=False"


ALONE = {
    "StateLeaky": lambda: snntorch.StateLeaky(0.9, N),
    "LinearLeaky": lambda: snntorch.LinearLeaky(0.9, N, N),
    "LeakyParallel": lambda: snntorch.LeakyParallel(N, N),
    "AssociativeLeaky": lambda: snntorch.AssociativeLeaky(N, 2, 2, 4),
}


@pytest.mark.parametrize("name", ALONE)
def test_sequence_layers_of_snntorch_say_that_unroll_alone_fuses_them(name, counted):
    """A call in sparse mode keeps upstream's numbers bit for bit, which the fused op's order of sums would not."""
    module, x = ALONE[name](), torch.rand(T, B, N)
    expected = module(x)
    report = sparsify(module)
    (row,) = report.as_dict()["rows"]
    assert (row["status"], row["reason"][:15]) == ("fused", "by unroll alone")
    actual = module(x)
    pairs = [(actual, expected)] if isinstance(actual, torch.Tensor) else zip(actual, expected, strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not counted
    assert reason(name) == "only unroll runs it fused"
    unroll(module, x)
    assert counted["cpu", "forward"] == 1


def test_delta_leaky_is_fused_by_unroll_alone(counted):
    module = snntorch.DeltaLeaky(0.5, beta=0.9, init_hidden=True)
    report = sparsify(module)
    assert "by unroll alone: its single steps are not recorded" in str(report)
    for x in torch.rand(T, B, N):
        module(x)
    assert not counted
    unroll(module, torch.rand(T, B, N))
    assert counted["cpu", "forward"] == 1


class TestCopies:
    """A copy of a sparsified model counts for itself, and the report of the original tells of it."""

    @pytest.fixture
    def net(self):
        return nn.Sequential(nn.Linear(N, N), snntorch.Leaky(0.9, init_hidden=True, output=True))

    def run(self, net):
        net[1].mem = torch.zeros(0)
        sum(net(x)[0] for x in torch.rand(T, B, N)).sum().item()
        net[1].mem = torch.zeros(0)  # copies of a graph are refused by torch

    def test_the_report_tells_of_them(self, net):
        report = sparsify(net, min_active=0)
        twin = copy.deepcopy(net)
        self.run(twin)
        assert report.runs() == {"1": {}}
        assert str(report).splitlines()[2].endswith("its copies: fused 1")
        self.run(copy.deepcopy(twin))
        self.run(net)
        assert str(report).splitlines()[2].endswith("fused 1; its copies: fused 2")
        assert tally.by_class()["Leaky"].modules["fused"] == 3

    def test_their_own_report_leaves_their_options(self, net):
        report = sparsify(net, backprop_threshold=0.3, min_active=0)
        twin = copy.deepcopy(net)
        self.run(twin)
        own = report.of(twin)
        assert own.runs() == {"1": {"fused": 1}}
        assert (own.config, own.names("fused")) == (report.config, ["1"])
        assert getattr(twin[1], MARK).overrides == {"backprop_threshold": 0.3, "min_active": 0}
        sparsify(twin, min_active=0)
        self.run(twin)  # it is a model of its own now
        assert str(report).splitlines()[2].endswith("its copies: fused 1")

    def test_a_report_that_is_copied_follows_its_model(self, net):
        report = sparsify(net)
        again, (twin, its) = copy.deepcopy(report), copy.deepcopy((net, report))
        self.run(twin)
        assert its.runs()["1"]["fused"] == 1
        twin[1].state_quant = torch.round
        assert its.names("masked") == ["1"]
        assert again.names("fused") == report.names("fused") == ["1"]
        self.run(net)
        assert again.runs() == report.runs() != {"1": {}}
        assert its.runs()["1"]["fused"] == 1
