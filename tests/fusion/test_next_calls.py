"""The next call of a recorded function is told by a look at its arguments: what differs has upstream's numbers, too."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import snn_sparse_plugin as ssp
from snn_sparse_plugin.fusion import calls

snn = pytest.importorskip("snntorch")

T, B, N = 12, 3, 6
Step = Callable[[Any, Tensor, Tensor, int], Tensor]


def network() -> Any:
    torch.manual_seed(0)
    net = nn.Module()
    net.fc, net.lif = nn.Linear(N, N), snn.Leaky(0.875, spike_grad=snn.surrogate.fast_sigmoid(5))
    net.a, net.b = nn.Parameter(torch.rand(N, N)), nn.Parameter(torch.rand(N, N))
    net.c = nn.Parameter(torch.rand(N))
    return net


def run(step: Step, sparse: bool) -> list[Tensor]:
    net, x = network(), (torch.rand(T, B, N, generator=torch.Generator().manual_seed(1)) < 0.5).float()
    with ssp.sparse_mode(backprop_threshold=None) if sparse else nullcontext():
        mem, out = net.lif.reset_mem(), []
        for t in range(T):
            spikes, mem = net.lif(net.fc(x[t]), mem)
            out.append(step(net, spikes, mem, t))
        torch.stack(out).pow(2).sum().backward()
    return [torch.stack(out).detach(), *(p.grad for p in net.parameters() if p.grad is not None)]


def twice(net: Any, spikes: Tensor, mem: Tensor, t: int) -> Tensor:
    return torch.relu(mem) + torch.relu(mem) * F.linear(spikes, net.a)


def reads_the_step_before(net: Any, spikes: Tensor, mem: Tensor, t: int) -> Tensor:
    net.before = getattr(net, "before", mem)
    made = torch.sigmoid(net.before) + mem
    net.before = mem if t % 3 else net.before
    return made


PROGRAMS: dict[str, Step] = {
    "the same each time": lambda net, s, mem, t: F.leaky_relu(mem, 0.25).flatten(1),
    "an integer beyond those that Python keeps": lambda net, s, mem, t: mem * int("1000") + s,
    "another number each step": lambda net, s, mem, t: mem * (1 + t) + s,
    "an integer, then a float, then a bool": lambda net, s, mem, t: mem * (1, 1.0, True)[t % 3] + s,
    "another dimension": lambda net, s, mem, t: torch.softmax(mem, t % 2),
    "another keyword": lambda net, s, mem, t: F.leaky_relu(mem, negative_slope=0.1 * (t % 2)),
    "a keyword that comes and goes": lambda net, s, mem, t: torch.add(mem, s, alpha=2) if t % 2 else mem + s,
    "two parameters in turn": lambda net, s, mem, t: torch.matmul(mem, net.a if t % 2 else net.b),
    "two parameters at each step": lambda net, s, mem, t: torch.matmul(mem, net.a) - torch.matmul(mem, net.b),
    "a parameter of another shape": lambda net, s, mem, t: mem * (net.c if t % 2 else net.a[0]),
    "arguments the other way round": lambda net, s, mem, t: mem - s if t % 2 else s - mem,
    "the same step twice": twice,
    "a result used with itself": lambda net, s, mem, t: torch.mul(mem, mem),
    "a step is left out": lambda net, s, mem, t: torch.relu(mem) if t % 4 else mem,
    "the step before": reads_the_step_before,
    "a tensor that is no parameter": lambda net, s, mem, t: mem * torch.full((N,), 1.0 + t),
    "a view": lambda net, s, mem, t: mem[:, 1:3] if t % 2 else mem[:, :2],
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_numbers_are_upstreams(name: str) -> None:
    for upstream, ours in zip(run(PROGRAMS[name], False), run(PROGRAMS[name], True), strict=True):
        torch.testing.assert_close(ours, upstream, rtol=1e-5, atol=1e-5)


def running_sum() -> Step:
    def step(net: Any, spikes: Tensor, mem: Tensor, t: int) -> Tensor:
        net.total = spikes if t == 0 else net.total + spikes
        net.mean = mem if t == 0 else 0.9 * net.mean + mem
        return torch.cat([net.total, net.mean], 1)

    return step


def test_running_sums() -> None:
    for upstream, ours in zip(run(running_sum(), False), run(running_sum(), True), strict=True):
        torch.testing.assert_close(ours, upstream, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("what", ["membrane", "spikes"])
def test_a_metric_without_gradient_leaves_the_others_theirs(what: str, every: int) -> None:
    def step(net: Any, spikes: Tensor, mem: Tensor, t: int) -> Tensor:
        read = mem if what == "membrane" else spikes
        with torch.set_grad_enabled(t % every != 0):
            metric = torch.tanh(read)
        return metric + torch.sigmoid(read) if t % 2 else torch.tanh(read)

    for _ in range(5):  # which function runs first is left to chance
        for upstream, ours in zip(run(step, False), run(step, True), strict=True):
            torch.testing.assert_close(ours, upstream, rtol=1e-5, atol=1e-5)


def test_most_calls_are_told_by_a_look(monkeypatch: pytest.MonkeyPatch) -> None:
    scanned = []
    monkeypatch.setattr(calls, "Call", lambda *args: scanned.append(args[0]) or Call(*args))
    run(lambda net, s, mem, t: F.leaky_relu(torch.matmul(mem, net.a), 0.25) + s, True)
    # the first of each function, what gathers the steps, and the loss
    assert len(scanned) < 10


Call = calls.Call
