"""Rows of a parameter that are kept: for as long as it is what it was, whoever changes it and however."""

from __future__ import annotations

import copy
import ctypes
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import snntorch as snn
import torch
from helpers import on_grid, spikes
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim.sgd import sgd

from snn_sparse_plugin import unroll
from snn_sparse_plugin.backends.cpu import weights
from snn_sparse_plugin.core.dynamics import NeuronParams
from snn_sparse_plugin.core.errors import NonFiniteError
from snn_sparse_plugin.ops.spiking_layer import spiking_layer

T, B, M, N = 10, 4, 20, 17
F32 = np.dtype("float32")


@pytest.fixture
def net() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(M, N), snn.Leaky(beta=0.5, init_hidden=True, output=True))
    with torch.no_grad():
        net[0].weight.copy_(on_grid(N, M, scale=0.5))
    return net


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(1)
    return spikes(T, B, M, p=0.3)


def membrane(net: nn.Module, x: Tensor) -> Tensor:
    net[1].reset_mem()
    with torch.no_grad():
        return unroll(net, x).mem  # type: ignore[return-value]


def of_a_copy(net: nn.Module, x: Tensor) -> Tensor:
    """What a network that has never run gives."""
    return membrane(copy.deepcopy(net), x)


def kept(weight: Tensor) -> np.ndarray | None:
    return weights._kept(weight).rows


def step_of(make: Callable[[Any], torch.optim.Optimizer]) -> Callable[[nn.Linear], None]:
    def change(layer: nn.Linear) -> None:
        optimizer = make(layer.parameters())
        for p in layer.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()

    return change


def in_place(layer: nn.Linear) -> None:
    with torch.no_grad():
        layer.weight += 1.0


def one_number(layer: nn.Linear) -> None:
    with torch.no_grad():
        layer.weight[3, 4] = 7.0


def detached(layer: nn.Linear) -> None:
    layer.weight.detach().mul_(2.0)


def data_in_place(layer: nn.Linear) -> None:
    layer.weight.data -= 1.0


def data_of_a_view(layer: nn.Linear) -> None:
    layer.weight.data[2].fill_(1.0)


def other_data(layer: nn.Linear) -> None:
    layer.weight.data = layer.weight.detach() + 1.0


def data_to_and_fro(layer: nn.Linear) -> None:
    for _ in range(3):  # memory that was let go of comes back
        layer.weight.data = torch.ones(N, M)


def numpy_view(layer: nn.Linear) -> None:
    layer.weight.detach().numpy()[:] += 1.0


def state_dict(layer: nn.Linear) -> None:
    layer.load_state_dict({"weight": torch.ones(N, M), "bias": torch.zeros(N)})


def assigned_state_dict(layer: nn.Linear) -> None:
    layer.load_state_dict({"weight": torch.ones(N, M), "bias": torch.zeros(N)}, assign=True)


def vector(layer: nn.Linear) -> None:
    vector_to_parameters(parameters_to_vector(layer.parameters()) + 1.0, layer.parameters())


def new_parameter(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(torch.ones(N, M))


def swapped(layer: nn.Linear) -> None:
    torch.utils.swap_tensors(layer.weight, nn.Parameter(torch.ones(N, M)))


def set_(layer: nn.Linear) -> None:
    with torch.no_grad():
        layer.weight.set_(torch.ones(N, M))


def initialised(layer: nn.Linear) -> None:
    torch.nn.init.constant_(layer.weight, 0.5)


def foreach(layer: nn.Linear) -> None:
    with torch.no_grad():
        torch._foreach_mul_([layer.weight, layer.bias], 2.0)


CHANGES: dict[str, Callable[[nn.Linear], None]] = {
    **{
        change.__name__: change
        for change in (
            *(in_place, one_number, detached, data_in_place, data_of_a_view, other_data, data_to_and_fro),
            *(numpy_view, state_dict, assigned_state_dict, vector, new_parameter, swapped, set_, initialised),
            foreach,
        )
    },
    **{
        f"{make.__name__} {option}": step_of(lambda p, make=make, option=option: make(p, lr=0.5, **option))
        for make in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
        for option in ({"foreach": False}, {"foreach": True}, {"fused": True})
    },
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(net: nn.Sequential, x: Tensor, change: str) -> None:
    before = [membrane(net, x) for _ in range(4)]
    assert all(torch.equal(each, before[0]) for each in before)
    for _ in range(2):
        with torch.no_grad():
            layer, old = net[0], net[0].weight.clone()
        CHANGES[change](layer)
        assert torch.equal(membrane(net, x), of_a_copy(net, x))
        if not torch.equal(old, layer.weight):
            before.append(membrane(net, x))
        for _ in range(3):
            assert torch.equal(membrane(net, x), of_a_copy(net, x))
    assert len(before) > 4
    assert not torch.equal(before[-1], before[0])


def test_a_fused_step_after_a_closure_that_runs_the_network(net: nn.Sequential, x: Tensor) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5, fused=True)

    def closure() -> Tensor:
        for _ in range(3):
            membrane(net, x)
        optimizer.zero_grad()
        net[1].reset_mem()
        loss = unroll(net, x).mem.square().mean()  # type: ignore[union-attr]
        loss.backward()
        net[1].reset_mem()
        return loss

    before = membrane(net, x)
    optimizer.step(closure)
    assert not torch.equal(membrane(net, x), before)
    assert torch.equal(membrane(net, x), of_a_copy(net, x))


def by_address(layer: nn.Linear) -> None:
    ctypes.memset(layer.weight.data_ptr(), 0, 4 * M * N)


def fused_without_its_optimizer(layer: nn.Linear) -> None:
    sgd(
        *([layer.weight], [torch.ones(N, M)], [None]),
        **{"fused": True, "lr": 0.5, "weight_decay": 0.0, "momentum": 0.0, "dampening": 0.0},
        **{"nesterov": False, "maximize": False},
    )


def of_its_storage(layer: nn.Linear) -> None:
    layer.weight.untyped_storage().copy_(torch.full((N, M), 0.25).untyped_storage())


@pytest.mark.parametrize("change", [by_address, fused_without_its_optimizer, of_its_storage])
def test_a_change_without_a_version(net: nn.Sequential, x: Tensor, change: Callable[[Any], None]) -> None:
    before = [membrane(net, x) for _ in range(4)][-1]
    version = net[0].weight._version
    change(net[0])
    assert net[0].weight._version == version
    assert not torch.equal(membrane(net, x), before)
    assert torch.equal(membrane(net, x), of_a_copy(net, x))


def test_memory_that_others_see(net: nn.Sequential, x: Tensor) -> None:
    class Own(nn.Parameter):
        pass

    numbers = np.zeros((N, M), np.float32)
    whole = torch.zeros(2 * N, M)
    ones: dict[str, tuple[nn.Parameter, Callable[[], Any]]] = {}
    ones["numpy"] = nn.Parameter(torch.from_numpy(numbers)), lambda: numbers.__iadd__(1.0)
    ones["part"] = nn.Parameter(whole[N:]), lambda: whole.add_(1.0)
    shared = nn.Parameter(torch.ones(N, M).share_memory_())
    ones["shared"] = shared, lambda: shared.detach().add_(1.0)
    own = Own(torch.ones(N, M))
    ones["subclass"] = own, lambda: own.data.mul_(2.0)
    for weight, change in ones.values():
        net[0]._parameters["weight"] = weight
        for _ in range(4):
            membrane(net, x)
        for _ in range(2):
            change()
            assert torch.equal(membrane(net, x), of_a_copy(net, x))


def test_a_weight_that_is_made_at_each_call(x: Tensor) -> None:
    """It may be in memory that another one was in, under its version."""
    params = NeuronParams(mem=0.5, syn=0.0, threshold=1.0)
    for k in range(6):
        weight = torch.full((N, M), float(k)) / 2
        out = spiking_layer(x, weight, params=params).spikes
        assert torch.equal(out, spiking_layer(x, weight.clone(), params=params).spikes)
        assert kept(weight) is None


def test_they_are_made_once_for_a_weight_that_stays(net: nn.Sequential, x: Tensor) -> None:
    assert kept(net[0].weight) is None
    membrane(net, x)
    assert kept(net[0].weight) is None  # it may be stepped after each batch
    membrane(net, x)
    rows = kept(net[0].weight)
    assert rows is not None
    membrane(net, x)
    assert kept(net[0].weight) is rows
    assert weights.transposed(net[0].weight, F32) is rows
    assert len(pickle.dumps(net[0])) < 2 * 4 * N * M
    assert np.array_equal(rows[:, :N], net[0].weight.detach().numpy().T)
    assert not rows[:, N:].any()


@pytest.mark.parametrize("fused", [False, True])
def test_an_optimizer_that_steps_after_each_batch_has_none_kept(x: Tensor, fused: bool) -> None:
    torch.manual_seed(0)
    neurons = [snn.Synaptic(alpha=0.5, beta=0.5, init_hidden=True, output=k == 2) for k in range(3)]
    linears = [nn.Linear(M, N), nn.Linear(N, N), nn.Linear(N, N)]
    net = nn.Sequential(*(module for pair in zip(linears, neurons, strict=True) for module in pair))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, fused=fused)
    for _ in range(4):
        for neuron in neurons:
            neuron.reset_mem()
        unroll(net, x).mem.square().mean().backward()  # type: ignore[union-attr]
        optimizer.step()
    for linear in linears:
        assert kept(linear.weight) is None


def test_gradients_that_add_up_over_batches(net: nn.Sequential, x: Tensor) -> None:
    def gradient(net: nn.Module) -> Tensor:
        net.zero_grad()
        unroll(net, x).mem.square().sum().backward()  # type: ignore[union-attr]
        net[1].reset_mem()
        return net[0].weight.grad.clone()  # type: ignore[union-attr]

    expected = gradient(copy.deepcopy(net))
    for _ in range(4):
        assert torch.equal(gradient(net), expected)
    assert kept(net[0].weight) is not None


def test_a_weight_that_is_not_finite_is_found_each_time(net: nn.Sequential, x: Tensor) -> None:
    for _ in range(3):
        membrane(net, x)
    with torch.no_grad():
        net[0].weight[0, 0] = float("nan")
    for _ in range(4):
        with pytest.raises(NonFiniteError, match="NaN or infinite"):
            membrane(net, x)
        assert kept(net[0].weight) is None


def test_they_go_with_their_weight(net: nn.Sequential, x: Tensor) -> None:
    for _ in range(3):
        membrane(net, x)
    twin = copy.deepcopy(net)
    assert kept(twin[0].weight) is None
    gone = weakref.ref(kept(net[0].weight))  # type: ignore[arg-type]
    assert gone() is not None
    net[0].weight = nn.Parameter(torch.ones(N, M))
    gc.collect()
    assert gone() is None
