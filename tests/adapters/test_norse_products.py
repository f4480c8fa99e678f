"""Norse multiplies its rates by the time step at every step: sparse mode makes these products once, bit-equal."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from types import MethodType
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

norse = pytest.importorskip("norse.torch")
from norse.torch.functional.lif_adex_refrac import LIFAdExRefracParameters  # noqa: E402
from norse.torch.functional.lif_refrac import LIFRefracParameters  # noqa: E402

from snn_sparse_plugin import sparse_mode  # noqa: E402

STEPPED = {"fuse_time": False, "backprop_threshold": None}

CELLS: dict[str, Callable[[], nn.Module]] = {
    "LIFCell": lambda: norse.LIFCell(dt=0.01),
    "LIFRecurrentCell": lambda: norse.LIFRecurrentCell(6, 6, dt=0.01),
    "LICell": lambda: norse.LICell(dt=0.01),
    "LILinearCell": lambda: norse.LILinearCell(6, 6, dt=0.01),
    "LIBoxCell": lambda: norse.LIBoxCell(dt=0.01),
    "LIFBoxCell": lambda: norse.LIFBoxCell(dt=0.01),
    "IAFCell": lambda: norse.IAFCell(dt=0.01),
    "LIFExCell": lambda: norse.LIFExCell(dt=0.01),
    "LIFAdExCell": lambda: norse.LIFAdExCell(dt=0.01),
    "LSNNCell": lambda: norse.LSNNCell(dt=0.01),
    "LSNNRecurrentCell": lambda: norse.LSNNRecurrentCell(6, 6, dt=0.01),
    "IzhikevichCell": lambda: norse.IzhikevichCell(norse.tonic_spiking),
    "LIFRefracCell": lambda: norse.LIFRefracCell(LIFRefracParameters(rho_reset=torch.tensor(2.0))),
    "LIFAdExRefracCell": lambda: norse.LIFAdExRefracCell(LIFAdExRefracParameters()),
    "CobaLIFCell": lambda: norse.CobaLIFCell(6, 6, dt=0.01),
}
TAU = torch.tensor(80.0)


class Counted(TorchDispatchMode):
    """How many operators ran."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


def steps(cell: Any, x: Tensor, state: Any = None) -> list[Tensor]:
    total = 0
    for current in x:
        out, state = cell(current, state)
        total = total + out
    return [total, *leaves(state)]


def leaves(state: Any) -> list[Tensor]:
    return [state] if isinstance(state, Tensor) else [x for part in state for x in leaves(part)]


def both(build: Callable[[], nn.Module], run: Callable[[Any, Tensor], list[Tensor]] = steps) -> None:
    """Values and gradients of upstream's steps, and of those in sparse mode, bit by bit."""
    found = []
    for sparse in (False, True):
        torch.manual_seed(0)
        cell, x = build(), (30 * torch.rand(5, 3, 6)).requires_grad_()
        if sparse:
            with sparse_mode(**STEPPED):
                out = run(cell, x)
        else:
            out = run(cell, x)
        wanted = [x, *cell.parameters()]
        graded = torch.autograd.grad(sum(o.sum() for o in out), wanted, allow_unused=True)
        found.append([*out, *graded])
    for expected, got in zip(*found, strict=True):
        assert (expected is None) == (got is None)
        assert got is None or torch.equal(expected, got)


@pytest.mark.parametrize("name", CELLS)
def test_steps_are_upstreams(name: str) -> None:
    both(CELLS[name])


def with_rate(tau: Any) -> nn.Module:
    return norse.LIFCell(norse.LIFParameters(tau_mem_inv=tau), dt=0.01)


@pytest.mark.parametrize("tau", [80.0, torch.tensor(80.0), torch.full((6,), 80.0), torch.rand(3, 6)])
def test_rates_of_any_kind(tau: Any) -> None:
    both(lambda: with_rate(tau))


def test_a_rate_that_learns() -> None:
    found = []
    for sparse in (False, True):
        tau = torch.tensor(80.0, requires_grad=True)
        with sparse_mode(**STEPPED) if sparse else torch.enable_grad():
            out, state = with_rate(tau)(torch.full((3, 6), 20.0))
            out, state = norse.LIFCell(norse.LIFParameters(tau_mem_inv=tau))(out, state)
        state.v.sum().backward()
        found.append(tau.grad)
    assert found[0] != 0
    assert torch.equal(*found)


def changed_in_place(cell: Any, x: Tensor) -> list[Tensor]:
    TAU.fill_(80.0)
    first = steps(cell, x)
    TAU.mul_(0.5)
    return first + steps(cell, x)


def learns_from_now_on(cell: Any, x: Tensor) -> list[Tensor]:
    first = steps(cell, x)
    cell.p.tau_mem_inv.requires_grad_()
    return first + steps(cell, x)


def other_parameters(cell: Any, x: Tensor) -> list[Tensor]:
    first = steps(cell, x)
    cell.p = norse.LIFParameters(tau_mem_inv=torch.tensor(40.0))
    return first + steps(cell, x)


def other_time_steps(cell: Any, x: Tensor) -> list[Tensor]:
    found = []
    for k in range(20):
        cell.dt = 0.001 * k if k % 3 else torch.tensor(0.001 * k)
        found += steps(cell, x)
    return found


def after_inference(cell: Any, x: Tensor) -> list[Tensor]:
    with torch.inference_mode():
        steps(cell, x)
    return steps(cell, x)


def copied(cell: Any, x: Tensor) -> list[Tensor]:
    first = steps(cell, x)
    return first + steps(copy.deepcopy(cell), x)


def another_activation(cell: Any, x: Tensor) -> list[Tensor]:
    first = steps(cell, x)
    cell.activation = lambda x, state, p, dt: (x * torch.exp(-dt * p.tau_mem_inv.sqrt()), state)
    return first + steps(cell, x, norse.LIFFeedForwardState(x[0], x[0]))


def under_a_mode(cell: Any, x: Tensor) -> list[Tensor]:
    with Counted() as mode:
        first = steps(cell, x)
    assert mode.calls
    return first + steps(cell, x)


@pytest.mark.parametrize(
    "run",
    [
        changed_in_place,
        learns_from_now_on,
        other_parameters,
        other_time_steps,
        after_inference,
        copied,
        another_activation,
        under_a_mode,
    ],
)
def test_what_changes_between_steps_is_seen(run: Any) -> None:
    both(lambda: with_rate(TAU if run is changed_in_place else torch.tensor(80.0)), run)


def test_the_products_are_made_once() -> None:
    cell, x = norse.LILinearCell(6, 6), torch.rand(3, 6)
    state = cell(x)[1]
    with sparse_mode(**STEPPED):
        cell(x, state)
        with Counted() as sparse:
            cell(x, state)
    with Counted() as upstream:
        cell(x, state)
    assert upstream.calls - sparse.calls == 2


def test_a_patched_forward_gets_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    class Mine(norse.LIFCell):
        def forward(self, input_tensor: Tensor, state: Any = None) -> Any:
            seen.append(self)
            return super().forward(input_tensor, state)

    cell = Mine()
    with sparse_mode(**STEPPED):
        cell(torch.rand(3, 6))
    assert seen == [cell]
    assert type(cell.p) is norse.LIFParameters
    assert type(cell.p.tau_mem_inv) is Tensor


def test_no_module_is_kept_alive() -> None:
    known, own = norse.LIFCell(), norse.LIFCell()
    own.activation = MethodType(lambda module, x, state, p, dt: (x, state), own)  # refers to the module
    with sparse_mode(**STEPPED):
        known(torch.rand(3, 6))
        own(torch.rand(3, 6))
    modules = [ref(known), ref(own)]
    del known, own
    gc.collect()
    assert [module() for module in modules] == [None, None]
