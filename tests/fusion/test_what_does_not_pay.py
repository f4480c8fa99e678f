"""Loops for which recording does not pay are stepped by upstream's own code, from counts alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snn_sparse_plugin as ssp
from snn_sparse_plugin.adapters import record_of
from snn_sparse_plugin.core import tally
from snn_sparse_plugin.fusion import governor
from snn_sparse_plugin.fusion.governor import FIRST_PAUSE, backoff
from snn_sparse_plugin.fusion.recorded import Recorded

snn = pytest.importorskip("snntorch")


@pytest.fixture(autouse=True)
def _fresh() -> None:
    tally.clear()


def network(N: int = 8, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Module()
    net.fc, net.lif = nn.Linear(N, N), snn.Leaky(0.875, **options)
    return net


def loop(net: Any, x: Tensor) -> tuple[bool, list[Tensor]]:
    """A pass of training: whether it was recorded, and its gradients."""
    mem, out = net.lif.reset_mem(), []
    for step in x:
        spikes, mem = net.lif(net.fc(step), mem)
        out.append(spikes)
    recorded = type(out[-1]) is Recorded
    net.zero_grad()
    (torch.stack(out).sum() + mem.pow(2).sum()).backward()
    return recorded, [p.grad.clone() for p in net.parameters()]


def passes(count: int, x: Tensor, net: Any, **options: Any) -> tuple[list[bool], list[list[Tensor]]]:
    with ssp.sparse_mode(**options):
        found = [loop(net, x) for _ in range(count)]
    return [recorded for recorded, _ in found], [grads for _, grads in found]


def test_it_is_learnt_in_two_passes_and_asked_again_later() -> None:
    x = (torch.rand(4, 2, 8) < 0.5).float()
    pause = FIRST_PAUSE // len(x)
    recorded, _ = passes(3 + pause, x, network())
    assert recorded == [True, True, *[False] * pause, True]


def test_a_long_loop_stays_recorded() -> None:
    recorded, _ = passes(5, (torch.rand(40, 2, 8) < 0.5).float(), network())
    assert recorded == [True] * 5


def test_a_short_loop_of_a_large_layer_stays_recorded() -> None:
    recorded, _ = passes(4, (torch.rand(4, 128, 400) < 0.02).float(), network(400))
    assert recorded == [True] * 4


def test_the_report_says_it() -> None:
    net = network()
    passes(4, (torch.rand(4, 2, 8) < 0.5).float(), net)
    assert record_of(net.lif).reason == "runs of 4 steps on 16 values, too few for recording to pay"
    assert record_of(net.lif).calls["exact"] == 8


def test_gradients_are_upstreams_with_the_automatic_window() -> None:
    x = (torch.rand(4, 2, 8) < 0.5).float()
    _, upstream = loop(network(), x)
    _, grads = passes(4, x, network())
    for got, want in zip(grads[-1], upstream, strict=True):
        assert torch.equal(got, want)


def test_a_window_that_is_asked_for_is_kept() -> None:
    x, net = (torch.rand(4, 2, 8) < 0.5).float(), network()
    options = {"backprop_threshold": 0.25, "min_active": 0}
    recorded, grads = passes(4, x, net, **options)
    assert recorded == [True, True, False, False]
    for first, last in zip(grads[0], grads[-1], strict=True):
        torch.testing.assert_close(last, first, rtol=1e-5, atol=1e-6)
    assert record_of(net.lif).calls["masked"] == 8


def test_it_is_the_same_every_time() -> None:
    x = (torch.rand(4, 2, 8) < 0.5).float()
    first, grads = passes(20, x, network())
    again, same = passes(20, x, network())
    assert first == again
    assert all(
        torch.equal(a, b)
        for one, other in zip(grads, same, strict=True)
        for a, b in zip(one, other, strict=True)
    )


def test_only_the_layers_of_a_circle_are_stepped() -> None:
    net = network()
    net.back, net.out, net.last = nn.Linear(8, 8), nn.Linear(8, 8), snn.Leaky(0.5)
    x = (torch.rand(40, 2, 8) < 0.5).float()
    kinds = []
    with ssp.sparse_mode():
        for _ in range(4):
            mem, end, spikes, out = net.lif.reset_mem(), net.last.reset_mem(), torch.zeros(2, 8), []
            for step in x:
                spikes, mem = net.lif(net.fc(step) + net.back(spikes), mem)
                seen, end = net.last(net.out(spikes), end)
                out.append(seen)
            kinds.append((type(spikes) is Recorded, type(seen) is Recorded))
            torch.stack(out).sum().backward()
    assert kinds[-1] == (False, True)
    assert record_of(net.lif).reason == "layers that feed each other in a circle"


def test_pauses_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(governor, "LONGEST_PAUSE", 600)
    net, found = network(), []
    with ssp.sparse_mode():
        for _ in range(300):
            loop(net, torch.zeros(4, 2, 8))
            found.append(backoff[net.lif].pause if net.lif in backoff else 0)
    assert sorted(set(found)) == [256, 600]


# --- a resting neuron's step goes straight to upstream's forward ---


def resting_network() -> tuple[Any, Tensor]:
    x, net = (torch.rand(4, 2, 8) < 0.5).float(), network()
    passes(3, x, net)
    assert backoff[net.lif].fed
    return net, x


def test_a_resting_step_runs_hooks() -> None:
    net, x = resting_network()
    seen: list[Any] = []
    net.lif.register_forward_hook(lambda *_: seen.append(1))
    passes(1, x, net)
    assert len(seen) == 4


def test_a_resting_step_runs_a_forward_of_its_own() -> None:
    net, _ = resting_network()
    forward = net.lif.forward
    net.lif.forward = lambda x, mem: tuple(2 * part for part in forward(x, mem))
    with ssp.sparse_mode():
        spikes, _ = net.lif(torch.full((2, 8), 9.0), torch.zeros(2, 8))
    assert (spikes == 2).all()


def test_a_resting_step_is_masked_where_a_window_is_asked_for() -> None:
    net, _ = resting_network()
    current = torch.full((2, 8), 5.0, requires_grad=True)
    with ssp.sparse_mode(backprop_threshold=0.1, min_active=0):
        net.lif(current, torch.zeros(2, 8))[0].sum().backward()
    assert (current.grad == 0).all()
    current.grad = None
    with ssp.sparse_mode():
        net.lif(current, torch.zeros(2, 8))[0].sum().backward()
    assert (current.grad != 0).all()


def test_resting_steps_are_counted_and_watched() -> None:
    net, x = resting_network()
    tally.clear()
    seen: list[int] = []
    with ssp.sparse_mode(), torch.no_grad():
        net.lif(x[0], torch.zeros(2, 8))
    passes(1, x, net)
    with ssp.sparse_mode(), tally.watchers.block(lambda record, spikes, active, steps: seen.append(steps)):
        loop(net, x)
    assert record_of(net.lif).calls.get("no_grad") == 1
    assert record_of(net.lif).calls["exact"] == 8
    assert sum(seen) == 4
    assert tally.by_class()["Leaky"].calls["exact"] == 8


def test_resting_steps_are_counted_while_the_block_is_open() -> None:
    net, x = resting_network()
    tally.clear()
    with ssp.sparse_mode():
        for n in (1, 2):
            loop(net, x)
            assert record_of(net.lif).calls["exact"] == 4 * n
    with tally.account() as account, ssp.sparse_mode():
        loop(net, x)
        with tally.aside():
            assert record_of(snn.Leaky(0.5)).calls == {}  # a new record
    assert account.classes["Leaky"].calls == {"exact": 4}


def test_a_resting_step_takes_recorded_numbers() -> None:
    net, x = resting_network()
    other = snn.Leaky(0.875)
    with ssp.sparse_mode(), torch.no_grad():
        recorded, _ = other(4 * x[0], torch.zeros(2, 8))
        assert type(recorded) is Recorded
        _, mem = net.lif(recorded, torch.zeros(2, 8))
        assert torch.equal(mem, recorded)
