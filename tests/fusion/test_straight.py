"""A network of Linear layers and neurons, run again without asking, as one node: the gradients of layer by layer."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import snntorch as snn
import torch
from helpers import on_grid, spikes
from torch import Tensor, nn

from snn_sparse_plugin import sparse_mode, sparsify, unroll
from snn_sparse_plugin.core import tally
from snn_sparse_plugin.core.backend import calls
from snn_sparse_plugin.fusion import layers, straight

T, B = 12, 3


def on_a_grid(net: nn.Module) -> Any:
    """The network, with weights whose sums are exact in any order."""
    with torch.no_grad():
        for weight in net.parameters():
            weight.copy_(on_grid(*weight.shape, scale=0.5))
    return net


def leaky(**options: Any) -> snn.Leaky:
    return snn.Leaky(beta=0.5, init_hidden=True, **options)


@pytest.fixture
def net() -> nn.Sequential:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(20, 17), leaky())
    layers = inner, nn.Linear(17, 9), leaky(), nn.Linear(9, 5), leaky(output=True)
    return on_a_grid(nn.Sequential(*layers))


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(1)
    return spikes(T, B, 20, p=0.3)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each call of unroll, whether the network ran as it was found."""
    found: list[bool] = []
    recall = straight.recall

    def looked(*args: Any) -> Any:
        known = recall(*args)
        found.append(known is not None)
        return known

    monkeypatch.setattr("snn_sparse_plugin.fusion.sequence.recall", looked)
    return found


def neurons(net: nn.Module) -> list[snn.Leaky]:
    return [module for module in net.modules() if isinstance(module, snn.Leaky)]


def fresh(net: nn.Module) -> None:
    net.zero_grad()
    for neuron in neurons(net):
        neuron.reset_mem()


def forgotten(net: nn.Module) -> None:
    straight._kept.pop(net, None)


def gradients(
    net: nn.Module, x: Tensor, loss: Callable[[Any], Tensor], **options: Any
) -> list[Tensor | None]:
    fresh(net)
    out = unroll(net, x, **options)
    loss(out).backward()
    found = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
    return [out.spikes.detach(), *(neuron.mem.detach() for neuron in neurons(net)), *found]


def same(found: list[Tensor | None], expected: list[Tensor | None]) -> None:
    for got, want in zip(found, expected, strict=True):
        assert (got is None) == (want is None)
        if want is not None:
            assert torch.equal(got, want)  # type: ignore[arg-type]


LOSSES: dict[str, Callable[[Any], Tensor]] = {
    "membrane": lambda out: out.mem.square().sum(),
    "spikes": lambda out: out.spikes.sum(),
    "both": lambda out: out.spikes.sum() + out.mem.square().sum(),
    "states": lambda out: sum(s["mem"].square().sum() for s in out.state if s is not None),
    "first state alone": lambda out: next(s for s in out.state if s is not None)["mem"].square().sum(),
}  # fmt: skip
WINDOWS = {"exact": None, "auto": "auto", "narrow": 0.3}


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("loss", LOSSES)
def test_the_second_call_gives_what_the_first_gave(
    net: nn.Sequential, x: Tensor, taken: list[bool], loss: str, window: str
) -> None:
    options = {"backprop_threshold": WINDOWS[window], "min_active": 0.0}
    first = gradients(net, x, LOSSES[loss], **options)
    again = gradients(net, x, LOSSES[loss], **options)
    assert taken == [False, True]
    same(again, first)


def test_frozen_layers(net: nn.Sequential, x: Tensor, taken: list[bool]) -> None:
    for frozen in ([net[0][0]], [net[1]], [net[0][0], net[1]], [net[3]]):
        net.requires_grad_(True)
        for layer in frozen:
            layer.requires_grad_(False)
        forgotten(net)
        same(gradients(net, x, LOSSES["both"]), gradients(net, x, LOSSES["both"]))
    assert taken == [False, True] * 4


def test_gradient_of_the_input(net: nn.Sequential, x: Tensor, taken: list[bool]) -> None:
    found = []
    for _ in range(2):
        fresh(net)
        given = x.clone().requires_grad_()
        unroll(net, given, backprop_threshold=None).mem.square().sum().backward()
        found.append(given.grad)
    assert taken == [False, True]
    assert torch.equal(*found)


def test_a_gradient_of_gradients(net: nn.Sequential, x: Tensor, taken: list[bool]) -> None:
    found = []
    of = [layer.weight for layer in (net[0][0], net[1], net[3])]
    for _ in range(2):
        fresh(net)
        out = unroll(net, x.clone().requires_grad_(), backprop_threshold=None)
        loss = out.mem.square().mean() + out.spikes.mean() + out.state[1]["mem"].square().mean()
        first = torch.autograd.grad(loss, of, create_graph=True)
        found.append([*first, *torch.autograd.grad(sum(g.square().sum() for g in first), of)])
    assert taken == [False, True]
    assert float(found[0][-3].detach().norm()) > 0
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_states_carry_on_with_their_graph(net: nn.Sequential, x: Tensor, taken: list[bool]) -> None:
    whole = gradients(net, x, lambda out: out.mem[6:].square().sum(), backprop_threshold=None)
    fresh(net)
    unroll(net, x[:6], backprop_threshold=None)
    out = unroll(net, x[6:], backprop_threshold=None)
    out.mem.square().sum().backward()
    assert taken == [False, False, True]
    for p, want in zip(net.parameters(), whole[-6:], strict=True):
        torch.testing.assert_close(p.grad, want, rtol=1e-5, atol=1e-6)


def test_a_second_backward_says_what_is_wrong(net: nn.Sequential, x: Tensor) -> None:
    for _ in range(2):
        fresh(net)
        loss = unroll(net, x).mem.sum()
        loss.backward(retain_graph=True)
    loss.backward()
    with pytest.raises(RuntimeError, match="second time") as raised:
        loss.backward()
    notes = getattr(raised.value, "__notes__", ["detach_hidden"])
    assert any("detach_hidden" in note for note in notes)


CHANGES: dict[str, Callable[[nn.Sequential], Any]] = {
    "another neuron": lambda net: net.__setitem__(2, snn.Leaky(beta=0.25, init_hidden=True)),
    "another neuron inside": lambda net: net[0].__setitem__(1, snn.Leaky(beta=0.25, init_hidden=True)),
    "a layer less": lambda net: (net.pop(4), net.pop(3)),
    "a layer more": lambda net: net.insert(3, nn.Identity()),
    "another weight": lambda net: net[1]._parameters.__setitem__("weight", nn.Parameter(on_grid(9, 17))),
    "a weight behind .data": lambda net: net[1].weight.data.neg_(),
    "a decay behind .data": lambda net: net[2].beta.data.fill_(0.25),
    "a decay above one": lambda net: net[2].beta.data.fill_(1.5),
    "a decay for each": lambda net: net[2]._buffers.__setitem__("beta", torch.full((9,), 0.25)),
    "graded spikes": lambda net: net[2].graded_spikes_factor.data.fill_(2.0),
    "a hook on the inside": lambda net: net[0].register_forward_hook(lambda *args: args[2] * 2),
    "a hook on a neuron": lambda net: net[2].register_forward_hook(lambda *args: args[2] * 2),
    "a forward of its own": lambda net: setattr(net[0], "forward", lambda x: net[0][1](2 * net[0][0](x))),
    "evaluation": lambda net: net.eval(),
    "a window of its own": lambda net: sparsify(net[2], backprop_threshold=0.01, min_active=0.0),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(net: nn.Sequential, x: Tensor, taken: list[bool], change: str) -> None:
    options = {} if change == "a window of its own" else {"backprop_threshold": None}
    loss = LOSSES["spikes"]
    for _ in range(2):
        gradients(net, x, loss, **options)
    assert taken == [False, True]
    CHANGES[change](net)
    found = gradients(net, x, loss, **options)
    forgotten(net)
    assert taken[-1] == ("weight" in change)  # these are read at every call
    expected = gradients(net, x, loss, **options)
    assert torch.equal(found[0], expected[0])
    for got, want in zip(
        found, expected, strict=True
    ):  # of layers that are stepped the library makes the products
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_other_forms_are_decided_anew(net: nn.Sequential, x: Tensor, taken: list[bool]) -> None:
    for given in (x, x[:, :2], x[:7], x.double()):
        net.to(given.dtype)
        same(gradients(net, given, LOSSES["both"]), gradients(net, given, LOSSES["both"]))
    for options in ({"events": True}, {"backprop_threshold": 0.2}, {"backend": "reference"}):
        for _ in range(2):
            fresh(net)
            unroll(net, x.double(), **options)
    with torch.no_grad():
        for _ in range(2):
            unroll(net, x.double())
    assert taken == [False, True] * 8


def test_a_state_of_another_form_is_asked_about(net: nn.Sequential, x: Tensor, taken: list[bool]) -> None:
    state = [None if layer is None else {"mem": torch.full((1, n), 0.5)} for layer, n in _states(net)]
    found = []
    for _ in range(2):
        fresh(net)
        found.append(unroll(net, x, state).mem.detach())
    assert torch.equal(*found)
    with pytest.raises(ValueError, match="entries"):
        unroll(net, x, state[:-1])


def _states(net: nn.Sequential) -> list[tuple[Any, int]]:
    return [(None, 0), (net[0][1], 17), (None, 0), (net[2], 9), (None, 0), (net[4], 5)]


def test_what_watches_is_told(net: nn.Sequential, x: Tensor, taken: list[bool]) -> None:
    for _ in range(2):
        gradients(net, x, LOSSES["both"])
    seen: list[str] = []
    with tally.watchers.block(lambda record, *rest: seen.append(record.kind)):
        gradients(net, x, LOSSES["both"])
    assert seen == ["Leaky"] * 3
    assert taken == [False, True, False]


def test_calls_are_counted(net: nn.Sequential, x: Tensor) -> None:
    before = calls["cpu", "forward"], calls["cpu", "backward"]
    with tally.account() as account:
        for _ in range(3):
            gradients(net, x, LOSSES["both"])
    ran = account.classes["Leaky"]
    assert (ran.calls["fused"], ran.calls["backward"], ran.modules["fused"]) == (9, 9, 3)
    assert (calls["cpu", "forward"] - before[0], calls["cpu", "backward"] - before[1]) == (9, 9)


def test_a_failure_leaves_the_states(net: nn.Sequential, x: Tensor) -> None:
    for _ in range(2):
        gradients(net, x, LOSSES["both"])
    before = [neuron.mem for neuron in neurons(net)]
    with torch.no_grad():
        net[3].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        unroll(net, x)
    assert all(neuron.mem is mem for neuron, mem in zip(neurons(net), before, strict=True))


def test_what_a_step_leaves_is_upstreams(net: nn.Sequential, x: Tensor) -> None:
    for _ in range(2):
        fresh(net)
        unroll(net, x)
        found = [neuron.reset for neuron in neurons(net)]
        fresh(net)
        for step in x:
            net(step)
        for neuron, reset in zip(neurons(net), found, strict=True):
            assert torch.equal(neuron.reset, reset)


def test_a_loop_after_it_makes_its_own_reset(net: nn.Sequential, x: Tensor) -> None:
    unroll(net, x)
    with sparse_mode():
        for step in x:
            out = net(step)
        assert out[0].shape == (B, 5)
        assert net[2].reset.shape == (B, 9)


def test_a_network_that_changes_all_the_time_is_left_alone(
    net: nn.Sequential, x: Tensor, taken: list[bool]
) -> None:
    for k in range(5):
        net[2].beta.fill_(0.5 + k / 16)
        gradients(net, x, LOSSES["both"])
    assert not any(taken)
    assert [*straight._kept[net].values()] == [None]


def test_nothing_is_kept_alive(x: Tensor) -> None:
    net = copy.deepcopy(
        nn.Sequential(nn.Linear(20, 4), leaky())
    )  # snnTorch itself keeps those that are built
    for _ in range(3):
        unroll(net, x)
    alive = [weakref.ref(module) for module in net.modules()]
    del net
    gc.collect()
    assert [reference() for reference in alive] == [None] * 3


# --- the same of a recorded loop ---


class Two(nn.Module):
    """Two layers whose spikes and states are in the loop's hands."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(20, 17), nn.Linear(17, 5)
        self.lif, self.out = snn.Leaky(beta=0.5), snn.Leaky(beta=0.5)
        on_a_grid(self)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        mem, out, mems, spikes = self.lif.init_leaky(), self.out.init_leaky(), [], []
        for step in x:
            spk, mem = self.lif(self.first(step), mem)
            last, out = self.out(self.second(spk), out)
            mems.append(out)
            spikes.append(last)
        return torch.stack(mems), torch.stack(spikes), spk, mem


READ: dict[str, Callable[..., Tensor]] = {
    "membranes": lambda mems, *_: mems.square().sum(),
    "spikes": lambda mems, spikes, *_: spikes.sum() + mems[-1].sum(),
    "hidden spikes of the last step": lambda mems, spikes, spk, mem: mems.square().sum() + 3 * spk.sum(),
    "hidden state": lambda mems, spikes, spk, mem: mems.sum() + mem.square().sum(),
    "hidden alone": lambda mems, spikes, spk, mem: spk.sum() + mem.square().sum(),
}


@pytest.mark.parametrize("frozen", ["", "first", "second"])
@pytest.mark.parametrize("read", READ)
def test_a_loop_runs_as_one_node(x: Tensor, monkeypatch: pytest.MonkeyPatch, read: str, frozen: str) -> None:
    chains = []
    run_chain = layers.run_chain

    def counted(x: Any, steps: Any, **options: Any) -> Any:
        chains.append(len(steps))
        return run_chain(x, steps, **options)

    monkeypatch.setattr(layers, "run_chain", counted)
    torch.manual_seed(0)
    net = Two()
    if frozen:
        getattr(net, frozen).requires_grad_(False)
    found = []
    for context in (nullcontext(), sparse_mode(backprop_threshold=None)):
        net.zero_grad()
        with context:
            outs = net(x)
        loss = READ[read](*outs)
        if loss.requires_grad:
            loss.backward()
        found.append([*(out.detach() for out in outs), *(p.grad for p in net.parameters())])
        found[-1] = [None if each is None else each.clone() for each in found[-1]]
    assert chains == [2]
    for got, want in zip(found[1], found[0], strict=True):
        assert (got is None) == (want is None)
        if want is not None:
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_a_hidden_layer_that_is_read_at_every_step_runs_by_itself(x: Tensor) -> None:
    torch.manual_seed(0)
    net, found = Two(), []
    for context in (nullcontext(), sparse_mode(backprop_threshold=None)):
        net.zero_grad()
        with context:
            mem, out, hidden, outs = net.lif.init_leaky(), net.out.init_leaky(), [], []
            for step in x:
                spk, mem = net.lif(net.first(step), mem)
                _, out = net.out(net.second(spk), out)
                hidden.append(mem)
                outs.append(out)
            loss = torch.stack(hidden).square().mean() + torch.stack(outs).square().mean()
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in net.parameters())])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_numbers_that_are_not_finite_go_upstreams_way(x: Tensor) -> None:
    torch.manual_seed(0)
    net = Two()
    with torch.no_grad():
        net.second.weight[0, 0] = float("inf")
    expected = [out.detach() for out in net(x)]
    with sparse_mode():
        found = [out.detach() for out in net(x)]
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, equal_nan=True)


def test_spikes_without_a_gradient_leave_none_below(x: Tensor) -> None:
    torch.manual_seed(0)
    net, found = Two(), []
    net.lif = snn.Leaky(beta=0.5, surrogate_disable=True)
    for context in (nullcontext(), sparse_mode(backprop_threshold=None)):
        net.zero_grad()
        with context:
            net(x)[0].square().sum().backward()
        found.append([None if p.grad is None else p.grad.clone() for p in net.parameters()])
    for got, want in zip(*found, strict=True):
        assert (got is None) == (want is None)
        if want is not None:
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert found[1][0] is None


def test_what_watches_a_loop_is_told(x: Tensor) -> None:
    torch.manual_seed(0)
    net, seen = Two(), []
    with tally.watchers.block(lambda record, *rest: seen.append(record.kind)), sparse_mode():
        net(x)
    assert seen == ["Leaky"] * 2
