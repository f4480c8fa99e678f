"""Layers that follow each other on a CPU: each range of samples runs through all of them, as if one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from helpers import on_grid, relative, spikes, torch_threads
from torch import Tensor, nn

import snn_sparse_plugin as ssp
from snn_sparse_plugin.backends.cpu import CPUBackend, layout, spiking_layer, spiking_layer_backward
from snn_sparse_plugin.core import registry
from snn_sparse_plugin.core.backend import Backend, calls
from snn_sparse_plugin.core.errors import NonFiniteError

snn = pytest.importorskip("snntorch")

T, B = 40, 5  # more steps than between two checkpoints, samples that no number of threads divides


@pytest.fixture(params=[1, 2, 3])
def ranges(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Into how many ranges the samples go, however short they are."""
    monkeypatch.setattr(layout, "SHORTEST", -1.0)
    with torch_threads(request.param):
        yield request.param


def network(*sizes: int, kind: str = "Leaky", scale: float = 1.0, **options: Any) -> nn.Sequential:
    """Weights whose sums are exact in any order."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    rest = {"alpha": 0.5} if kind == "Synaptic" else {}
    for inputs, neurons in pairwise(sizes):
        neuron = getattr(snn, kind)(**rest, beta=0.5, init_hidden=True, **options)
        layers += [nn.Linear(inputs, neurons), neuron]
    layers[-1].output = True  # type: ignore[assignment]
    net = nn.Sequential(*layers)
    with torch.no_grad():
        for weight in net.parameters():
            if weight.dim() > 1:
                weight.copy_(on_grid(*weight.shape, scale=scale))
    return net


def biased(value: float, layers: slice = slice(None)) -> nn.Sequential:
    """Some layers get a current at every step."""
    net = network(20, 30, 25, 6)
    with torch.no_grad():
        for layer in net[::2][layers]:
            layer.bias.fill_(value)
    return net


def frozen(layer: int) -> nn.Sequential:
    net = network(20, 30, 25, 6)
    net[2 * layer].requires_grad_(False)
    return net


WINDOW: dict[str, Any] = {"backprop_threshold": 0.5, "min_active": 0.0}
EXACT: dict[str, Any] = {"backprop_threshold": None}
OWN = "input_grad", "silent", "states", "steps"  # options of this file, not of unroll
CASES: dict[str, tuple[Callable[[], nn.Sequential], dict[str, Any]]] = {
    "window": (lambda: network(20, 30, 25, 6), WINDOW),
    "exact": (lambda: network(20, 30, 25, 6), EXACT),
    "guarded": (lambda: network(20, 30, 25, 6), {**WINDOW, "min_active": 0.35}),
    "synapse": (lambda: network(20, 30, 25, 6, kind="Synaptic"), WINDOW),
    "synapse, exact": (lambda: network(20, 30, 25, 6, kind="Synaptic"), EXACT),
    "reset to zero": (lambda: network(20, 30, 25, 6, reset_mechanism="zero"), WINDOW),
    "reset to zero, exact": (lambda: network(20, 30, 25, 6, reset_mechanism="zero"), EXACT),
    "all fire": (lambda: biased(2.0), WINDOW),
    "all fire, exact": (lambda: biased(2.0), EXACT),
    "none fires": (lambda: biased(-9.0, slice(1)), WINDOW),
    "first is frozen": (lambda: frozen(0), EXACT),
    "float64": (lambda: network(20, 30, 25, 6).double(), WINDOW),
    # a product that has to be made before the layer below goes on
    "wide, exact": (lambda: network(20, 30, 80, 6).double(), EXACT),
    "first samples are silent": (lambda: biased(0.0), {**WINDOW, "silent": 4}),
    "first samples are silent, exact": (lambda: biased(0.0), {**EXACT, "silent": 4}),
    "input's gradient": (lambda: network(20, 30, 25, 6), {**WINDOW, "input_grad": True}),
    "middle is frozen": (lambda: frozen(1), WINDOW),
    "gradients of states": (lambda: network(20, 30, 25, 6), {**WINDOW, "states": True}),
    "gradients of states, exact": (lambda: network(20, 30, 25, 6), {**EXACT, "states": True}),
    "first is frozen, window": (lambda: frozen(0), WINDOW),
    "decays learn": (lambda: network(20, 30, 25, 6, learn_beta=True), EXACT),
    "few steps, wide": (lambda: network(20, 30, 80, 6), {**EXACT, "steps": 3}),
    "two steps": (lambda: network(20, 30, 25, 6), {**EXACT, "steps": 2}),
    # whether to keep the membrane depends on how many events there are
    "many inputs": (lambda: network(20, 90, 2, scale=1.0), EXACT),
}


def result(net: nn.Sequential, x: Tensor, options: dict[str, Any]) -> list[Tensor | None]:
    """Spikes, membrane, states and gradients, of the input as well."""
    net.zero_grad()
    for neuron in net[1::2]:
        neuron.reset_mem()
    x = x[: options.get("steps", T)].clone().requires_grad_(options.get("input_grad", False))
    x.data[:, : options.get("silent", 0)] = 0
    out = ssp.unroll(net, x, **{name: value for name, value in options.items() if name not in OWN})
    torch.manual_seed(2)
    loss = (out.spikes * on_grid(*out.spikes.shape)).sum() + (out.mem * on_grid(*out.mem.shape)).sum()  # type: ignore[union-attr]
    states = out.state[1::2] if options.get("states") else out.state[-1:]
    (loss + sum(state["mem"].square().sum() for state in states)).backward()
    ended = [state["mem"] for state in out.state[1::2]]
    return [out.spikes, out.mem, *ended, x.grad, *(p.grad for p in net.parameters())]


def assert_same(found: list[Tensor | None], expected: list[Tensor | None]) -> None:
    """But for the order of sums over samples."""
    for a, b in zip(found, expected, strict=True):
        if a is None or b is None:
            assert a is b
        else:
            assert relative(a, b) < (1e-6 if a.dtype == torch.float32 else 1e-14)


@pytest.fixture
def one_by_one() -> Callable[[], Any]:
    """A context in which the CPU is given each layer by itself, and all samples at once."""

    def context() -> Any:
        patch = pytest.MonkeyPatch()
        patch.setattr(layout, "SHORTEST", float("inf"))
        patch.setattr(CPUBackend, "spiking_layers", Backend.spiking_layers)
        patch.setattr(CPUBackend, "spiking_layers_backward", Backend.spiking_layers_backward)
        patch.setattr(CPUBackend, "spiking_layer", lambda self, call: spiking_layer.run_forward([call])[0])
        patch.setattr(CPUBackend, "spiking_layer_backward", _backward)
        return patch

    return context


def _backward(self: Any, call: Any, saved: Any, events: Any, grads: Any, needs: Any) -> Any:
    layer = spiking_layer_backward.LayerBackward(call, saved, events, needs)
    return spiking_layer_backward.run_backward([layer], grads)[0]


@pytest.mark.parametrize("case", CASES)
def test_the_numbers_of_one_by_one(case: str, ranges: int, one_by_one: Callable[[], Any]) -> None:
    make, options = CASES[case]
    net = make()
    x = spikes(T, B, 20, p=0.3).to(net[0].weight.dtype)
    result(net, x, options)  # the first call finds out that they may run together
    found = result(net, x, options)
    patch = one_by_one()
    expected = result(net, x, options)
    patch.undo()
    assert case == "none fires" or found[0].any()  # type: ignore[union-attr]
    assert_same(found, expected)
    forward = 2 + len(net) // 2
    assert all(map(torch.equal, found[:forward], expected[:forward]))  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{**WINDOW, "backprop_threshold": 9.0}, EXACT], ids=["window", "exact"])
def test_what_others_read_of_a_layer_between(options: dict[str, Any], ranges: int) -> None:
    """Its gradient comes from two sides: in a loop whose loss is of hidden spikes, too."""
    net, x = network(20, 30, 25, 6), spikes(T, B, 20, p=0.3)

    def run(fuse: bool) -> list[Any]:
        net.zero_grad()
        for neuron in net[1::2]:
            neuron.reset_mem()
        hidden, last = [], []
        with ssp.sparse_mode(**options, fuse_time=fuse):
            for step in x:
                hidden.append(net[1](net[0](step)))
                last.append(net[5](net[4](net[3](net[2](hidden[-1]))))[0])
            spk = torch.stack(hidden), torch.stack(last)
            (spk[0].mean(0).square().sum() + spk[1].mean(0).square().sum()).backward()
        return [*spk, *(p.grad for p in net.parameters())]

    for a, b in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.fixture
def woken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Who has handed work to other threads."""
    found: list[str] = []
    for module in (spiking_layer, spiking_layer_backward):
        name = module.__name__.rpartition(".")[2]
        upstream = module.in_stages

        def counted(ranges: Any, *rest: Any, name: str = name, upstream: Any = upstream) -> Any:
            found.extend([name] * (len(ranges) > 1))
            return upstream(ranges, *rest)

        monkeypatch.setattr(module, "in_stages", counted)
    return found


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("options", [WINDOW, EXACT], ids=["window", "exact"])
def test_how_often_threads_are_woken(
    options: dict[str, Any], large: bool, ranges: int, woken: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    net, x = network(20, 30, 25, 6), spikes(T, B, 20, p=0.3)
    result(net, x, options)
    together = result(net, x, options)
    if large:
        monkeypatch.setattr(layout, "TOGETHER", 0)
    woken.clear()
    found = result(net, x, options)
    times = (ranges > 1) * (3 if large else 1)
    assert woken == ["spiking_layer"] * times + ["spiking_layer_backward"] * times
    assert_same(found, together)


def test_who_is_not_finite_is_named(ranges: int) -> None:
    net, x = network(20, 30, 25, 6), spikes(T, B, 20, p=0.3)
    ssp.unroll(net, x)
    with torch.no_grad():
        net[2].weight[0, 0] = torch.nan
    before = [dict(neuron.named_buffers()) for neuron in net[1::2]]
    with pytest.raises(NonFiniteError, match="2→3.*The weight has NaN"):
        ssp.unroll(net, x)
    for neuron, buffers in zip(net[1::2], before, strict=True):
        assert all(neuron.get_buffer(name) is x for name, x in buffers.items())


@pytest.mark.parametrize("options", [WINDOW, EXACT], ids=["window", "exact"])
def test_a_subclass_is_asked_for_each_layer(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Under its own name."""
    asked: list[str] = []

    class Asked(CPUBackend):
        name = "asked"

        def spiking_layer(self, call: Any) -> Any:
            asked.append("forward")
            return super().spiking_layer(call)

        def spiking_layer_backward(self, *args: Any) -> Any:
            asked.append("backward")
            return super().spiking_layer_backward(*args)

    monkeypatch.setattr(registry.load("backends", "cpu"), "__class__", Asked)
    net, x = network(20, 30, 25, 6), spikes(T, B, 20, p=0.3)
    for _ in range(2):
        asked.clear()
        before = calls["asked", "forward"], calls["asked", "backward"]
        result(net, x, options)
        assert asked == ["forward"] * 3 + ["backward"] * 3
        assert (calls["asked", "forward"], calls["asked", "backward"]) == (before[0] + 3, before[1] + 3)
