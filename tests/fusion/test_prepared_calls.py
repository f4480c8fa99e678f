"""What a call has decided is kept for the next one of its form: whatever changes in between has to be seen."""

from __future__ import annotations

import copy
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import snntorch as snn
import torch
from torch import Tensor, nn

from snn_sparse_plugin import unroll
from snn_sparse_plugin.backends.cpu import threads
from snn_sparse_plugin.core import registry
from snn_sparse_plugin.core.backend import calls

T, B = 12, 3


def grid(*shape: int) -> Tensor:
    """Weights whose sums are exact in any order."""
    return torch.randint(-32, 33, shape) / 64


@pytest.fixture
def net() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(20, 17),
        snn.Leaky(beta=0.5, init_hidden=True),
        nn.Linear(17, 5),
        snn.Leaky(beta=0.5, init_hidden=True, output=True),
    )
    with torch.no_grad():
        for weight in net.parameters():
            weight.copy_(grid(*weight.shape))
    return net


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(1)
    return (torch.rand(T, B, 20) < 0.3).float()


def fresh(net: nn.Module) -> None:
    net.zero_grad()
    for module in net:
        if isinstance(module, snn.Leaky):
            module.reset_mem()


def fused(net: nn.Module, x: Tensor, **options: object) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    fresh(net)
    spikes, mem, _ = unroll(net, x, **options)
    if mem.requires_grad:
        (spikes.sum() + mem.square().sum()).backward()
    return spikes.detach(), mem.detach(), [p.grad for p in net.parameters()]


def stepped(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    fresh(net)
    spikes, mem = (torch.stack(values) for values in zip(*(net(step) for step in x), strict=True))
    if mem.requires_grad:
        (spikes.sum() + mem.square().sum()).backward()
    return spikes.detach(), mem.detach(), [p.grad for p in net.parameters()]


def check(net: nn.Module, x: Tensor) -> None:
    spikes, mem, grads = fused(net, x, backprop_threshold=None)
    grads = [None if g is None else g.clone() for g in grads]
    expected_spikes, expected_mem, expected = stepped(net, x)
    assert torch.equal(spikes, expected_spikes)
    torch.testing.assert_close(mem, expected_mem)
    for found, wanted in zip(grads, expected, strict=True):
        assert (found is None) == (wanted is None)
        if wanted is not None:
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


CHANGES = {
    "in place": lambda net: net[0].weight.detach().mul_(2),
    "behind .data": lambda net: net[0].weight.data.neg_(),
    "another tensor in .data": lambda net: setattr(net[2].weight, "data", grid(5, 17)),
    "another parameter": lambda net: setattr(net[0], "weight", nn.Parameter(grid(17, 20))),
    "no bias": lambda net: setattr(net[0], "bias", None),
    "frozen": lambda net: net[0].weight.requires_grad_(False),
    "all frozen": lambda net: net.requires_grad_(False),
    "another decay": lambda net: setattr(net[1], "beta", torch.tensor(0.25)),
    "a decay in place": lambda net: net[1].beta.fill_(0.25),
    "a decay behind .data": lambda net: net[1].beta.data.fill_(0.25),
    "another threshold": lambda net: setattr(net[3], "threshold", torch.tensor(0.5)),
    "a decay for each neuron": lambda net: setattr(net[1], "beta", torch.full((17,), 0.25)),
    "a decay that learns": lambda net: setattr(net[1], "beta", nn.Parameter(torch.tensor(0.25))),
    "a decay above one": lambda net: net[1].beta.fill_(1.5),
    "another surrogate": lambda net: setattr(net[1], "spike_grad", snn.surrogate.fast_sigmoid(5)),
    "another slope": lambda net: setattr(net[1].spike_grad.__closure__[0], "cell_contents", 5.0),
    "a slope that is a tensor": lambda net: setattr(
        net[1].spike_grad.__closure__[0], "cell_contents", torch.tensor(5.0)
    ),
    "a spike function of its own": lambda net: setattr(net[1], "spike_grad", lambda x: torch.sigmoid(4 * x)),
    "another reset": lambda net: setattr(net[1], "state_function", net[1]._base_zero),
    "another reset mechanism": lambda net: setattr(net[1], "reset_mechanism", "zero"),
    "a reset without delay": lambda net: setattr(net[1], "reset_delay", False),
    "graded spikes": lambda net: net[1].graded_spikes_factor.fill_(2),
    "inhibition": lambda net: setattr(net[1], "inhibition", True),
    "quantised states": lambda net: setattr(net[1], "state_quant", lambda mem: (mem * 8).round() / 8),
    "a step of its own": lambda net: setattr(net[1], "fire", lambda mem: (mem > 2).float()),
    "a hook": lambda net: net[1].register_forward_hook(lambda module, args, out: out * 0.5),
    "a hook on the layer": lambda net: net[2].register_forward_hook(lambda module, args, out: out * 0.5),
    "another class": lambda net: setattr(net[1], "__class__", Louder),
}  # fmt: skip


class Louder(snn.Leaky):
    """A neuron with a step of its own."""

    def fire(self, mem: Tensor) -> Tensor:
        return super().fire(2 * mem)


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_two_calls_is_seen(net: nn.Sequential, x: Tensor, change: str) -> None:
    check(net, x)
    CHANGES[change](net)
    check(net, x)


@pytest.mark.parametrize(("owner", "name"), [(snn.Leaky, "fire"), (snn.surrogate.ATan, "backward")])
def test_a_patch_and_its_end_are_seen(
    net: nn.Sequential, x: Tensor, monkeypatch: pytest.MonkeyPatch, owner: type, name: str
) -> None:
    def halved(*args: Any) -> Any:
        out = plain(*args)
        return 0.5 * out if isinstance(out, Tensor) else tuple(g if g is None else 0.5 * g for g in out)

    plain = getattr(owner, name)
    check(net, x)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, halved if name == "fire" else staticmethod(halved))
        check(net, x)
    check(net, x)


def test_what_is_kept_keeps_no_network(net: nn.Sequential, x: Tensor) -> None:
    check(net, x)
    fresh(net)
    neurons = [copy.deepcopy(net[1]) for _ in range(3)]
    neurons[1].fire = partial(fire_of, neurons[1])
    neurons[2].spike_grad = partial(fire_of, neurons[2])
    for neuron in neurons:
        unroll(nn.Sequential(net[0], neuron), x)
    alive = [weakref.ref(neuron) for neuron in neurons]
    del neurons, neuron
    gc.collect()
    assert [reference() for reference in alive] == [None] * 3


def fire_of(neuron: snn.Leaky, mem: Tensor) -> Tensor:
    return (mem > neuron.threshold).float()


def test_other_shapes_and_options_are_other_calls(net: nn.Sequential, x: Tensor) -> None:
    check(net, x)
    check(net, x[:, :2])
    check(net, x[:7])
    check(net, x * 0.5)
    check(net, x.requires_grad_())
    exact = [g.clone() for g in fused(net, x.detach(), backprop_threshold=None)[2]]
    cut = fused(net, x.detach(), backprop_threshold=0.05, min_active=0.0)[2]
    assert not torch.equal(exact[0], cut[0])
    again = fused(net, x.detach(), backprop_threshold=None)[2]
    assert all(torch.equal(a, b) for a, b in zip(exact, again, strict=True))
    with pytest.raises(ValueError, match="700"):
        unroll(net, torch.zeros(T, B, 700))


def test_a_named_backend_is_another_call(net: nn.Sequential, x: Tensor) -> None:
    for backend in ("cpu", "reference", "cpu"):
        before = calls[backend, "forward"]
        fused(net, x, backend=backend)
        assert calls[backend, "forward"] > before
    registry.refresh()
    check(net, x)


def test_autocast_is_another_call(net: nn.Sequential, x: Tensor) -> None:
    plain = fused(net, x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        half = unroll(net, x)[1]
    assert half.dtype == net[3].mem.dtype
    assert torch.equal(fused(net, x)[0], plain)


def test_without_gradients_few_rows_give_the_same_spikes(net: nn.Sequential, x: Tensor) -> None:
    one = x[:, :1]
    with torch.no_grad():
        fresh(net)
        pieces = [unroll(net, piece) for piece in one.split(5)]  # hidden states carry on
    expected = stepped(net, one)
    assert torch.equal(torch.cat([piece.spikes for piece in pieces]), expected[0])
    torch.testing.assert_close(torch.cat([piece.mem for piece in pieces]), expected[1])


def test_a_small_call_wakes_no_thread(net: nn.Sequential, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    woken = []
    monkeypatch.setattr(threads, "_prepare", woken.append)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        check(net, x)
    finally:
        torch.set_num_threads(before)
    assert not woken


def test_copies_and_threads_keep_apart(net: nn.Sequential, x: Tensor) -> None:
    check(net, x)
    fresh(net)  # a state with a graph cannot be copied
    nets = [copy.deepcopy(net) for _ in range(4)]
    with torch.no_grad():
        for k, each in enumerate(nets):
            each[0].weight.add_(grid(17, 20) * (k + 1))
    alone = [fused(each, x) for each in nets]
    alone = [(s, m, [g.clone() for g in grads]) for s, m, grads in alone]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda each: fused(each, x), nets))
    for (s, m, grads), (s2, m2, grads2) in zip(alone, together, strict=True):
        assert torch.equal(s, s2)
        assert torch.equal(m, m2)
        assert all(torch.equal(a, b) for a, b in zip(grads, grads2, strict=True))
