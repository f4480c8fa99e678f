"""Small networks and the ways to run them over all steps, for the tests of what training scripts do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from helpers import on_grid, relative, spikes
from torch import Tensor, nn

snntorch = pytest.importorskip("snntorch")
norse = pytest.importorskip("norse.torch")
from snntorch import surrogate  # noqa: E402

from snn_sparse_plugin import sparse_mode, unroll  # noqa: E402

T, B, M, H, N = 12, 4, 10, 8, 5
EXACT: dict[str, Any] = {"backprop_threshold": None}


class Way(NamedTuple):
    """A network and how it is run over all steps: sparse, and by upstream alone. Both return (spikes, state)."""

    build: Callable[[], nn.Module]
    sparse: Callable[..., tuple[Tensor, Any]]
    upstream: Callable[..., tuple[Tensor, Any]]


def snntorch_net() -> nn.Module:
    options = {"beta": 0.875, "threshold": 0.5, "spike_grad": surrogate.fast_sigmoid(5), "init_hidden": True}
    layers = (
        nn.Linear(M, H),
        snntorch.Leaky(**options),
        nn.Linear(H, N),
        snntorch.Leaky(output=True, **options),
    )
    return nn.Sequential(*layers)


def _norse() -> nn.Module:
    layers = nn.Linear(M, H), norse.LIF(_lif()), nn.Linear(H, N), norse.LIF(_lif())
    return norse.SequentialState(*layers)


def _lif() -> Any:
    tensors = {"tau_syn_inv": 500.0, "tau_mem_inv": 500.0, "v_th": 0.25}
    return norse.LIFParameters(**{k: torch.tensor(v) for k, v in tensors.items()}, alpha=torch.tensor(5.0))


def _steps(net: nn.Module, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
    """snnTorch's step loop; the state is a list of membranes."""
    neurons = [m for m in net.modules() if isinstance(m, snntorch.Leaky)]
    for k, neuron in enumerate(neurons):
        neuron.mem = torch.zeros(0) if state is None else state[k]
    out = torch.stack([net(h)[0] for h in x.unbind(0)])
    return out, [neuron.mem for neuron in neurons]


def unrolled(net: nn.Module, x: Tensor, state: Any = None, **options: Any) -> tuple[Tensor, Any]:
    for k, neuron in enumerate(m for m in net.modules() if isinstance(m, snntorch.Leaky)):
        neuron.mem = torch.zeros(0) if state is None else state[k]
    out = unroll(net, x, **EXACT | options)
    return out.spikes, [s["mem"] for s in out.state if s is not None]


def stepped(net: nn.Module, x: Tensor, state: Any = None, **options: Any) -> tuple[Tensor, Any]:
    with sparse_mode(**EXACT | options):
        return _steps(net, x, state)


def _sequence(net: nn.Module, x: Tensor, state: Any = None, **options: Any) -> tuple[Tensor, Any]:
    with sparse_mode(**EXACT | options):
        return net(x, state)


WAYS = {
    "snntorch-unroll": Way(snntorch_net, unrolled, _steps),
    "snntorch-loop": Way(snntorch_net, stepped, _steps),
    "norse-sequence": Way(_norse, _sequence, lambda net, x, state=None: net(x, state)),
}


def batch() -> Tensor:
    return spikes(T, B, M, p=0.4)


def linears(net: nn.Module) -> list[nn.Linear]:
    return [m for m in net.modules() if isinstance(m, nn.Linear)]


def gridded(net: nn.Module) -> nn.Module:
    with torch.no_grad():
        for layer in linears(net):
            for parameter in layer.parameters():
                parameter.copy_(on_grid(*parameter.shape, scale=0.5))
    return net


def target(x: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(T, B, N, generator=generator, dtype=torch.float64).to(x.dtype)


def loss_of(out: Tensor, share: Tensor | None = None) -> Tensor:
    return (out * (target(out) if share is None else share)).sum()


def gradients(net: nn.Module, loss: Tensor) -> list[Tensor]:
    net.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in net.parameters() if p.requires_grad]


def close(actual: list[Tensor], expected: list[Tensor], tolerance: float = 1e-5) -> None:
    assert any(e.any() for e in expected), "the problem has no gradient"
    worst = max(relative(a, e) for a, e in zip(actual, expected, strict=True))
    assert worst <= tolerance


def detached(state: Any) -> Any:
    if isinstance(state, Tensor):
        return state.detach()
    if isinstance(state, list):
        return [detached(s) for s in state]
    return None if state is None else type(state)(*map(detached, state))
