"""Helpers of a step loop that torch compiles, scripts or transforms get recorded steps as they are upstream."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snn_sparse_plugin as ssp
from snn_sparse_plugin.fusion.reuse import held

snn = pytest.importorskip("snntorch")


def decayed(mem: Tensor, spikes: Tensor) -> Tensor:
    return mem * 0.9 - spikes * 0.1


def scripted() -> Callable[..., Tensor]:
    return torch.jit.script(decayed)


def traced() -> Callable[..., Tensor]:
    return torch.jit.trace(decayed, (torch.ones(2, 3), torch.ones(2, 3)))  # type: ignore[no-any-return]


def compiled() -> Callable[..., Tensor]:
    return torch.compile(decayed, backend="eager")


def compiled_with_autograd() -> Callable[..., Tensor]:
    return torch.compile(decayed, backend="aot_eager")


def mapped() -> Callable[..., Tensor]:
    return torch.vmap(decayed)


def scripted_module() -> Callable[..., Tensor]:
    class Decayed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.tensor(0.9), requires_grad=False)

        def forward(self, mem: Tensor, spikes: Tensor) -> Tensor:
            return mem * self.factor - spikes * 0.1

    return torch.jit.script(Decayed())


HELPERS = [scripted, traced, compiled, compiled_with_autograd, mapped, scripted_module]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("helper", HELPERS, ids=lambda f: f.__name__)
def test_a_helper_between_two_steps(helper: Callable[[], Callable[..., Tensor]]) -> None:
    def run(block: Any) -> list[Any]:
        torch.manual_seed(0)
        layer, neuron, between = nn.Linear(20, 16), snn.Leaky(beta=0.9), helper()
        with block:
            mem, out = torch.zeros(4, 16), []
            for step in (torch.rand(5, 4, 20) < 0.5).float():
                spikes, mem = neuron(layer(step), mem)
                mem = between(mem, spikes)
                out.append(spikes)
            (torch.stack(out).sum() + mem.sum()).backward()
        return [torch.stack(out).detach(), mem.detach(), layer.weight.grad]

    for want, got in zip(
        run(nullcontext()), run(ssp.sparse_mode(backprop_threshold=None, min_active=0)), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_who_holds_a_tensor_is_counted() -> None:
    kept = object()
    assert held([kept]) == [kept]
    assert held([object()]) == []
