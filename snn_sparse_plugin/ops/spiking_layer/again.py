"""The gradient of the op as a differentiable function, for ``create_graph=True``: the reference loop under autograd."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.backend import LayerCall, Saved, enough
from ...core.spikes import SpikeTrain, coordinates
from ...core.surrogates import Surrogate
from .reference import run

Leaves = dict[str, Tensor | None]


def gradients(
    call: LayerCall,
    surrogate: Surrogate,
    saved: Saved,
    train: SpikeTrain | None,
    leaves: Leaves,
    grads: tuple[Tensor | None, ...],
) -> dict[str, Tensor | None]:
    """Gradients of ``leaves`` that can be differentiated again, by name.

    Args:
        call: the call without its tensors.
        surrogate: of the call.
        saved: window and active entries of its forward.
        train: input events, or None where ``leaves["current"]`` or ``leaves["dense"]`` is the input.
        leaves: the op's tensor inputs at their place in the graph; ``"carrier"`` is that of the input events.
        grads: of the output's carrier, spikes, mem, v, i.

    Whether the window holds is read from ``saved.near`` on the host: the reference loop is in Python.
    """
    held = saved.near is None or bool(saved.near >= enough(call))
    window = saved.threshold if held else None
    with torch.enable_grad():
        # views, as one leaf may be made of another, such as rec0 of rec_weight
        inner = {
            name: x.view_as(x) for name, x in leaves.items() if isinstance(x, Tensor) and x.requires_grad
        }
        inputs: dict[str, Any] = {**leaves, **inner}
        current = inputs["current"]
        if train is not None:
            current = F.linear(with_carrier(train, inner.get("carrier")), inputs["weight"], inputs["bias"])
        elif inputs["dense"] is not None:
            current = F.linear(inputs["dense"], inputs["weight"], inputs["bias"])
        current = current.expand(call.T, -1, -1)
        _, spikes, mems, v, i = run(call, lambda x: _Spike.apply(x, surrogate, window), current, inputs)
        g_carrier, *rest = grads
        pairs = list(zip((spikes, mems, v, i), rest, strict=True))
        if g_carrier is not None and saved.active is None:
            pairs.append((spikes, g_carrier))
        elif g_carrier is not None:
            pairs.append((spikes[_places(saved.active, call.T)], g_carrier))
        pairs = [(out, g) for out, g in pairs if out is not None and g is not None and out.requires_grad]
        if not pairs or not inner:
            return {}
        outs, gs = zip(*pairs, strict=True)
        found = torch.autograd.grad(outs, list(inner.values()), gs, create_graph=True, allow_unused=True)
    return dict(zip(inner, found, strict=True))


def _places(active: Any, T: int) -> tuple[Tensor, ...]:
    """Where the entries of an active list stand in (T, B, N)."""
    rows, columns = coordinates(*active)
    return rows % max(T, 1), rows // max(T, 1), columns


def with_carrier(train: SpikeTrain, carrier: Tensor | None) -> Tensor:
    """The spikes (T, B, M), a function of the carrier of their gradient, whose numbers do not count."""
    data = train._dense_data().flatten(2)
    if carrier is None:
        return data
    carrier = carrier - carrier.detach()
    if train.active is None:
        return data + carrier.view(data.shape)
    return data + torch.zeros_like(data).index_put(_places(train.active, train.T), carrier)


class _Spike(torch.autograd.Function):
    """Heaviside, whose backward is a formula that autograd knows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, surrogate: Surrogate, threshold: float | None) -> Tensor:
        ctx.surrogate, ctx.threshold = surrogate, threshold
        spikes = (x > 0).to(x.dtype)
        ctx.save_for_backward(x, spikes)
        return spikes

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        x, spikes = ctx.saved_tensors
        # upstream's Heaviside multiplies with its output, which is a spike function of x again
        slope = spikes if ctx.surrogate.kind == "heaviside" else ctx.surrogate.grad(x)
        grad = slope * grads[0]
        return (grad if ctx.threshold is None else grad * (x.abs() < ctx.threshold)), None, None
