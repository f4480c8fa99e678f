"""Upstream's own step loops, and upstream with its surrogate zeroed outside a window."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn

# in Triton's interpreter, a process of its own, the matrices of neurons and backends run on triton alone
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
STEPS, SAMPLES = (10, 2) if INTERPRETING else (40, 3)
BACKENDS = (
    [pytest.param("triton", marks=pytest.mark.triton_interpreter)] if INTERPRETING else ["cpu", "reference"]
)


def on_grid(net: nn.Module, scale: float = 4.0) -> nn.Module:
    """Weights on multiples of 2^-8: with inputs 0 and 1 every order of summation gives one sum."""
    with torch.no_grad():
        for module in net.modules():
            for p in module.parameters(recurse=False):
                if isinstance(module, nn.Linear | nn.Conv2d):
                    p.copy_((p * scale * 256).round() / 256)
    return net


def spikes(*shape: int, density: float = 0.2, seed: int = 0) -> Tensor:
    return (torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < density).float()


def snntorch_loop(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Spikes and membrane of a network whose last neuron has output=True."""
    outs = [net(h) for h in x.unbind(0)]
    return torch.stack([o[0] for o in outs]), torch.stack([o[-1] for o in outs])


def norse_loop(net: nn.Module, x: Tensor, state: object = None) -> tuple[Tensor, object]:
    """Outputs and last state of a network of Norse cells."""
    outs = []
    for h in x.unbind(0):
        out, state = net(h, state)
        outs.append(out)
    return torch.stack(outs), state


def windowed(function: Callable[[Tensor], Tensor], window: float) -> Callable[[Tensor], Tensor]:
    """A spike function whose own gradient is zeroed where |x| >= window."""
    return lambda x: function(torch.where(x.detach().abs() < window, x, x.detach()))


def relative(actual: Tensor | None, expected: Tensor | None) -> float:
    """Relative norm of the difference; a gradient that is missing on one side only is infinitely wrong."""
    if actual is None or expected is None:
        missing = actual is None and expected is None
        return 0.0 if missing else float("inf")
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-30))


def worst(actual: Iterable[Tensor | None], expected: Iterable[Tensor | None]) -> float:
    return max(relative(a, e) for a, e in zip(actual, expected, strict=True))
