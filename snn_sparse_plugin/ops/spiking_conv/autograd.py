"""Autograd of a convolution of spikes: kept are the events, or the input that the caller holds anyway, and the winners
of a max-pool."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core.backend import RunsConvolutions, calls
from ...core.convolution import Convolution
from ...core.precision import without_autocast
from ...core.spikes import Active, SpikeTrain
from ..spiking_layer.again import with_carrier
from . import library
from .reference import convolved


def convolve(
    conv: Convolution,
    x: Tensor | SpikeTrain,
    weight: Tensor,
    bias: Tensor | None,
    backend: RunsConvolutions | None,
) -> Tensor:
    """The current (T, B, C', *out). ``backend``: adds rows of the weight for events; None: torch's product."""
    train = x if isinstance(x, SpikeTrain) else None
    given = train.carrier if train is not None else x
    leaves = (given, weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in leaves):
        out: Tensor = _Convolve.apply(conv, train, backend, *leaves)
        return out
    return _forward(conv, x, weight, bias, backend, False)[0]


def _forward(
    conv: Convolution,
    x: Tensor | SpikeTrain,
    weight: Tensor,
    bias: Tensor | None,
    backend: RunsConvolutions | None,
    keep: bool,
) -> tuple[Tensor, Tensor | None]:
    if backend is None:
        calls["torch", "convolution"] += 1
        return library.forward(conv, x, weight, bias, keep)
    assert isinstance(x, SpikeTrain)
    calls[backend.name, "convolution"] += 1
    current, winners = backend.convolution(conv, x, weight, bias, keep)
    return current.view(*x.shape[:2], conv.out_channels, *conv.out_size), winners


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        conv: Convolution,
        train: SpikeTrain | None,
        backend: RunsConvolutions | None,
        given: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        x = given if train is None else train.detach()
        assert x is not None
        current, winners = _forward(conv, x, weight, bias, backend, True)
        ctx.conv, ctx.backend, ctx.train_like = conv, backend, None
        kept = [given, weight, bias, winners]
        if train is not None:
            events, active = train.tensors(), list(train.active or ())
            ctx.train_like = train.shape, train.dtype, train.values is not None, len(events)
            kept += events + active
        ctx.save_for_backward(*kept)
        return current

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        given, weight, bias, winners, *kept = ctx.saved_tensors
        conv, needs, nu = ctx.conv, ctx.needs_input_grad[3:], grads[0].contiguous()
        x = given if ctx.train_like is None else _train(ctx.train_like, kept)
        if torch.is_grad_enabled():  # the gradient is to be differentiated again
            return (None, None, None, *_differentiable(conv, x, (given, weight, bias), nu, needs))
        with without_autocast():
            if ctx.backend is None:
                of_input, *others = library.backward(conv, x, weight, nu, winners, needs)
            else:
                wanted = "none" if not needs[0] else "dense" if x.active is None else "active"
                *others, of_input = ctx.backend.convolution_backward(
                    conv, x, weight, nu, winners, weight_grad=needs[1], bias_grad=needs[2], input=wanted
                )
        return (None, None, None, None if of_input is None else of_input.view(given.shape), *others)


def _train(like: tuple[Any, ...], kept: list[Tensor]) -> SpikeTrain:
    """The events that were kept, with the list of those that take a gradient."""
    shape, dtype, graded, n = like
    events, active = kept[:n], Active(*kept[n:]) if len(kept) > n else None
    values = events.pop() if graded else None
    if len(events) == 1:
        train = SpikeTrain.from_words(events[0], shape, dtype=dtype, active=active)
        return train if values is None else train._replace(values=values)
    indptr, indices = events
    return SpikeTrain(indptr, indices, shape, values, dtype=dtype, active=active, check=False)


def _differentiable(
    conv: Convolution,
    x: Tensor | SpikeTrain,
    leaves: tuple[Tensor | None, ...],
    nu: Tensor,
    needs: tuple[bool, ...],
) -> list[Tensor | None]:
    """Gradients of input, weight and bias that can be differentiated again, from the convolution in plain torch."""
    with torch.enable_grad():
        # views, as the user may want the gradient of one that is made of another
        given, weight, bias = (
            t.view_as(t) if need and t is not None else t for t, need in zip(leaves, needs, strict=True)
        )
        dense = with_carrier(x, given if needs[0] else None) if isinstance(x, SpikeTrain) else given
        rows = dense.reshape(-1, conv.in_channels, *conv.size)  # type: ignore[union-attr]
        out = convolved(conv, rows, weight, bias)  # type: ignore[arg-type]
        wanted = [t for t, need in zip((given, weight, bias), needs, strict=True) if need]
        found = iter(torch.autograd.grad(out, wanted, nu.view_as(out), create_graph=True))  # type: ignore[arg-type]
    return [next(found) if need else None for need in needs]
