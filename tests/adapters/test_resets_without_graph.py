"""What resets a neuron of snnTorch has no gradient: sparse mode makes it without a graph, bit-equal to upstream's."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

snn = pytest.importorskip("snntorch")
from snntorch import surrogate  # noqa: E402

from snn_sparse_plugin import sparse_mode  # noqa: E402

FACTORIES = [
    "atan",
    "fast_sigmoid",
    "sigmoid",
    "straight_through_estimator",
    "triangular",
    "heaviside",
    "SFS",
]
EXACT = {"fuse_time": False, "backprop_threshold": None}
NEAR = [1 - 2**-24, 1.0, 1 + 2**-23, -1.0, 0.0, math.inf, -math.inf, math.nan]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What upstream's ATan was applied to."""
    found, upstream = [], surrogate.ATan.apply

    def apply(x: Tensor, alpha: float) -> Tensor:
        found.append(x)
        return upstream(x, alpha)

    monkeypatch.setattr(surrogate.ATan, "apply", apply)
    return found


def step(neuron: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Spikes, membrane and reset of one step from the membranes NEAR the threshold."""
    mem = torch.tensor([NEAR], requires_grad=True)
    with sparse_mode(**options):
        spikes, mem = neuron(torch.ones(1, len(NEAR)), mem)
    return spikes, mem, neuron.reset


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("name", FACTORIES)
def test_it_is_upstreams(name: str, dtype: torch.dtype) -> None:
    neuron = snn.Leaky(0.5, spike_grad=getattr(surrogate, name)())
    mem = torch.tensor(NEAR, dtype=dtype)
    expected = neuron.mem_reset(mem)
    with sparse_mode():
        found = neuron.mem_reset(mem.requires_grad_())
    assert found.dtype is expected.dtype
    assert torch.equal(found, expected)
    assert not found.requires_grad


@pytest.mark.parametrize("reset", ["subtract", "zero", "none"])
@pytest.mark.parametrize("kind", ["Leaky", "Synaptic", "RLeaky", "SLSTM"])
def test_gradients_of_steps_are_upstreams(kind: str, reset: str) -> None:
    def run(net: Any, x: Tensor) -> list[Tensor]:
        state, total = net.reset_mem(), 0
        for current in x:
            out = net(current, *(state if isinstance(state, tuple) else (state,)))
            state, total = out[1:], total + out[0]
        (total.sum() + state[-1].sum()).backward()
        return [total, *state, x.grad]

    build: dict[str, Callable[..., nn.Module]] = {
        "Leaky": lambda: snn.Leaky(0.9, threshold=0.5, learn_threshold=True, reset_mechanism=reset),
        "Synaptic": lambda: snn.Synaptic(0.8, 0.9, threshold=0.5, reset_mechanism=reset),
        "RLeaky": lambda: snn.RLeaky(0.9, threshold=0.5, linear_features=6, reset_mechanism=reset),
        "SLSTM": lambda: snn.SLSTM(6, 6, threshold=0.1, reset_mechanism=reset),
    }
    found = []
    for options in (None, EXACT):
        torch.manual_seed(0)
        net, x = build[kind](), torch.rand(5, 3, 6).requires_grad_()
        if options is None:
            found.append([*run(net, x), *(p.grad for p in net.parameters())])
        else:
            with sparse_mode(**options):
                found.append([*run(net, x), *(p.grad for p in net.parameters())])
    for one, other in zip(*found, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


def test_upstreams_function_is_applied_once_a_step(calls: list[Tensor]) -> None:
    neuron = snn.Leaky(0.5)
    step(neuron, **EXACT)
    assert len(calls) == 1
    neuron(torch.ones(1, 8), torch.ones(1, 8))
    assert len(calls) == 3


def test_the_reset_has_memory_of_its_own() -> None:
    mem = torch.full((1, 8), 2.0)
    neuron = snn.Leaky(0.5)
    with sparse_mode(fuse_time=False):
        neuron(torch.ones(1, 8), mem)
        neuron.reset.zero_()
    assert (mem == 2).all()


def test_a_function_of_the_users_is_called_for_it() -> None:
    seen: list[Tensor] = []

    def function(x: Tensor) -> Tensor:
        seen.append(x)
        return (x > -10).float()

    neuron = snn.Leaky(0.5, spike_grad=surrogate.atan())
    assert step(neuron, **EXACT)[2].sum() == 2
    neuron.spike_grad = function  # of a neuron that was known
    assert step(neuron, **EXACT)[2].sum() == 6
    assert len(seen) == 2


def test_another_forward_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    neuron = snn.Leaky(0.5)
    assert step(neuron, **EXACT)[2].sum() == 2

    def forward(ctx: Any, x: Tensor, alpha: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.alpha = alpha
        return (x >= 0).float()

    monkeypatch.setattr(surrogate.ATan, "forward", staticmethod(forward))
    assert step(neuron, **EXACT)[2].sum() == 3
    assert step(snn.Leaky(0.5), **EXACT)[2].sum() == 3


def test_a_method_of_the_users_is_called() -> None:
    class Mine(snn.Leaky):
        def mem_reset(self, mem: Tensor) -> Tensor:
            return 1 - super().mem_reset(mem)

    assert step(Mine(0.5), **EXACT)[2].sum() == len(NEAR) - 2


def test_a_threshold_of_another_dtype(calls: list[Tensor]) -> None:
    neuron = snn.Leaky(0.5, threshold=torch.tensor(0.3, dtype=torch.float64))
    mem = torch.tensor([[0.3, 0.29, 0.31]], dtype=torch.float16)
    expected = neuron.mem_reset(mem)
    with sparse_mode():
        assert torch.equal(neuron.mem_reset(mem), expected)
    assert len(calls) == 2


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.functions: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.functions.append(func)
        return func(*args, **(kwargs or {}))


def test_who_looks_at_operators_sees_upstreams() -> None:
    neuron, mem = snn.Leaky(0.5), torch.ones(1, 3)
    with Seen() as upstream:
        neuron.mem_reset(mem)
    with sparse_mode(), Seen() as sparse:
        neuron.mem_reset(mem)
    assert sparse.functions == upstream.functions
