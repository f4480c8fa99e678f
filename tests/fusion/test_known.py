"""What one step loop found out about a neuron is what the next one takes, unless the neuron has changed."""

from __future__ import annotations

import gc
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import snntorch as snn
import torch
from helpers import on_grid, spikes
from snntorch import surrogate
from torch import Tensor, nn

from snn_sparse_plugin import sparse_mode
from snn_sparse_plugin.adapters import snntorch as adapter
from snn_sparse_plugin.fusion import known

T, B, M, N = 12, 3, 20, 17


@pytest.fixture
def layer() -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(M, N)
    with torch.no_grad():
        layer.weight.copy_(on_grid(N, M, scale=0.5))
        layer.bias.copy_(on_grid(N, scale=0.5))
    return layer


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(1)
    return spikes(T, B, M, p=0.4)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The neurons that were asked what they are."""
    found: list[Any] = []
    upstream = adapter.SnnTorchAdapter.neuron

    def neuron(self: Any, module: Any) -> Any:
        found.append(module)
        return upstream(self, module)

    monkeypatch.setattr(adapter.SnnTorchAdapter, "neuron", neuron)
    return found


def loop(layer: nn.Linear, neuron: Any, x: Tensor) -> list[Tensor]:
    """Spikes, membranes, and the gradient of the weight."""
    layer.zero_grad()
    state, outs, mems = neuron.reset_mem(), [], []
    for step in x:
        out, state = neuron(layer(step), state)
        outs.append(out)
        mems.append(state)
    found = torch.stack(outs), torch.stack(mems)
    (found[0].sum() + found[1].square().sum()).backward()
    return [*(each.detach() for each in found), layer.weight.grad.clone()]  # type: ignore[union-attr]


def same_as_upstream(layer: nn.Linear, neuron: Any, x: Tensor) -> list[Tensor]:
    with sparse_mode(backprop_threshold=None):
        found = loop(layer, neuron, x)
    for got, want in zip(found, loop(layer, neuron, x), strict=True):
        assert torch.allclose(got, want, rtol=1e-5, atol=1e-5)
    assert torch.equal(found[0], loop(layer, neuron, x)[0])
    return found


def test_a_neuron_is_read_once(layer: nn.Linear, x: Tensor, read: list[Any]) -> None:
    neuron, twin = snn.Leaky(beta=0.5), snn.Leaky(beta=0.5)
    expected = loop(layer, twin, x)
    for _ in range(4):
        with sparse_mode(backprop_threshold=None):
            found = loop(layer, neuron, x)
        assert torch.equal(found[0], expected[0])
    assert read.count(neuron) <= 2  # to be recorded, and for the report
    count = len(read)
    with sparse_mode(backprop_threshold=None):
        loop(layer, neuron, x)
    assert len(read) == count


def in_place(neuron: Any) -> None:
    neuron.beta.fill_(0.25)


def data(neuron: Any) -> None:
    neuron.threshold.data.mul_(2.0)


def through_numpy(neuron: Any) -> None:
    neuron.beta.numpy()[...] = 0.25


def in_double_precision(neuron: Any) -> None:
    neuron.beta.data = torch.tensor(0.25, dtype=torch.float64)


def other_buffer(neuron: Any) -> None:
    neuron.beta = torch.tensor(0.25)


def learned(neuron: Any) -> None:
    beta = neuron._buffers.pop("beta")
    neuron.beta = nn.Parameter(beta / 2)


def one_for_each_neuron(neuron: Any) -> None:
    neuron.beta = torch.linspace(0, 0.5, N)


def other_surrogate(neuron: Any) -> None:
    neuron.spike_grad = surrogate.sigmoid(slope=3)


def other_slope(neuron: Any) -> None:
    function = neuron.spike_grad
    cell = next(
        c for n, c in zip(function.__code__.co_freevars, function.__closure__, strict=True) if n == "slope"
    )
    cell.cell_contents = 2.0


def a_function_of_its_own(neuron: Any) -> None:
    neuron.spike_grad = lambda x: surrogate.atan()(x - 0.25)


def other_reset(neuron: Any) -> None:
    neuron.reset_mechanism_val.fill_(1)
    neuron.state_function = neuron._base_zero


def reset_of_another(neuron: Any) -> None:
    """A method that is bound to another neuron, whose numbers it takes."""
    other = snn.Leaky(beta=0.125)
    other.mem, other.reset = torch.zeros(B, N), torch.zeros(B, N)
    neuron.state_function = other._base_sub


def a_method_of_its_own(neuron: Any) -> None:
    upstream = neuron._base_state_function
    neuron._base_state_function = lambda x: upstream(x) + 0.25


def graded(neuron: Any) -> None:
    neuron.graded_spikes_factor.fill_(0.5)


def data_of_another_shape(neuron: Any) -> None:
    neuron.beta.data = torch.linspace(0, 0.5, N)


def set_to_another_shape(neuron: Any) -> None:
    neuron.beta.set_(torch.linspace(0, 0.5, N))


def an_attribute_more(neuron: Any) -> None:
    neuron.owner = neuron


CHANGES = [
    *(
        in_place,
        data,
        through_numpy,
        in_double_precision,
        data_of_another_shape,
        set_to_another_shape,
        other_buffer,
        learned,
        one_for_each_neuron,
    ),
    *(
        other_surrogate,
        other_slope,
        a_function_of_its_own,
        other_reset,
        reset_of_another,
        a_method_of_its_own,
    ),
    *(graded, an_attribute_more),
]


@pytest.mark.parametrize(
    "number",
    [torch._efficientzerotensor(()), torch._neg_view(torch.tensor(0.5)), torch.tensor(0.5).bfloat16()],
)
def test_numbers_without_memory_of_their_own_are_asked(number: Tensor) -> None:
    known_number = known._Number(number)
    assert known_number.holds()
    assert known_number._cell is None


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_is_seen(
    layer: nn.Linear, x: Tensor, change: Callable[[Any], None], read: list[Any]
) -> None:
    neuron = snn.Leaky(beta=0.5, spike_grad=surrogate.fast_sigmoid(slope=5))
    before = [same_as_upstream(layer, neuron, x) for _ in range(3)][-1]
    change(neuron)
    for _ in range(3):
        after = same_as_upstream(layer, neuron, x)
    different = any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert different or change is an_attribute_more
    assert len(read) > 1


def test_a_method_of_the_class(layer: nn.Linear, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    neuron = snn.Leaky(beta=0.5)
    before = [same_as_upstream(layer, neuron, x) for _ in range(3)][-1]
    upstream = snn.Leaky._base_state_function
    monkeypatch.setattr(snn.Leaky, "_base_state_function", lambda self, x: upstream(self, x) + 0.25)
    after = [same_as_upstream(layer, neuron, x) for _ in range(3)][-1]
    assert not torch.equal(before[0], after[0])


def test_other_forms_of_an_input(layer: nn.Linear, x: Tensor) -> None:
    neuron = snn.Leaky(beta=0.5)
    for samples in (B, 1, B, 2):
        for _ in range(2):
            same_as_upstream(layer, neuron, x[:, :samples])


def test_inference_first(layer: nn.Linear, x: Tensor) -> None:
    neuron = snn.Leaky(beta=1.5)  # clamped, to a tensor that is made
    with torch.inference_mode(), sparse_mode():
        for _ in range(2):
            state, outs = neuron.reset_mem(), []
            for step in x:
                out, state = neuron(layer(step), state)
                outs.append(out)
            torch.stack(outs)
    for _ in range(2):
        same_as_upstream(layer, neuron, x)


@pytest.mark.parametrize(
    "refers", [None, "attribute", "function", "closure", "inner closure", "default", "note"]
)
def test_a_module_is_forgotten(layer: nn.Linear, x: Tensor, refers: str | None) -> None:
    neuron = snn.Leaky(beta=0.5)
    if refers == "attribute":
        neuron.others = [neuron]
    elif refers == "function":
        neuron.name_of = types.MethodType(lambda self: "n", neuron)
    elif refers == "closure":
        neuron.name_of = (lambda neuron: lambda: neuron)(neuron)
    elif refers == "inner closure":
        neuron.name_of = (lambda inner: lambda: inner())((lambda neuron: lambda: neuron)(neuron))
    elif refers == "default":
        neuron.name_of = lambda neuron=neuron: neuron
    elif refers == "note":
        neuron.name_of = lambda: "n"
        neuron.name_of.of = neuron
    for _ in range(3):
        same_as_upstream(layer, neuron, x)
    assert (known._neurons.get(neuron) is not None) == (refers in (None, "function"))
    gone = weakref.ref(neuron)
    kept = snn.SpikingNeuron.instances  # where upstream keeps all of them
    kept[:] = [other for other in kept if other is not neuron]
    del neuron
    gc.collect()
    assert gone() is None
