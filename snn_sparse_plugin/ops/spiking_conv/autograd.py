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
from .norm import Factors, Norm, apart, of_channels
from .reference import convolved


def convolve(
    conv: Convolution,
    x: Tensor | SpikeTrain,
    weight: Tensor,
    bias: Tensor | None,
    backend: RunsConvolutions | None,
    norm: Norm | None = None,
) -> Tensor:
    """The current (T, B, C', *out). ``backend``: adds rows of the weight for events; None: torch's product.

    ``norm``: the batch norm before the pool.
    """
    train = x if isinstance(x, SpikeTrain) else None
    given = train.carrier if train is not None else x
    factors = None if norm is None else norm.factors()
    leaves = (given, weight, bias, *(factors or (None, None)))
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in leaves):
        out: Tensor = _Convolve.apply(conv, train, backend, norm, *leaves)
        return out
    return _forward(conv, x, weight, bias, backend, False, norm, factors)[0]


def _forward(
    conv: Convolution,
    x: Tensor | SpikeTrain,
    weight: Tensor,
    bias: Tensor | None,
    backend: RunsConvolutions | None,
    keep: bool,
    norm: Norm | None,
    factors: Factors | None,
) -> tuple[Tensor, Tensor | None]:
    if backend is None:
        calls["torch", "convolution"] += 1
        current, winners = library.forward(conv, x, weight, bias, keep, norm)
    else:
        assert isinstance(x, SpikeTrain)
        calls[backend.name, "convolution"] += 1
        current, winners = backend.convolution(conv, x, weight, bias, keep, factors)
    # no view: autograd lets nobody write into one that was made in here, and ReLU(inplace=True) may come next
    shape = (*x.shape[:2], conv.out_channels, *conv.out_size)
    return torch.ops.aten._unsafe_view(current, shape), winners


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        conv: Convolution,
        train: SpikeTrain | None,
        backend: RunsConvolutions | None,
        norm: Norm | None,
        given: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
    ) -> Tensor:
        x = given if train is None else train.detach()
        assert x is not None
        factors = None if scale is None or shift is None else (scale, shift)
        current, winners = _forward(conv, x, weight, bias, backend, True, norm, factors)
        ctx.conv, ctx.backend, ctx.train_like = conv, backend, None
        kept = [given, weight, bias, scale, shift, winners]
        if train is not None:
            events, active = train.tensors(), list(train.active or ())
            ctx.train_like = train.shape, train.dtype, train.values is not None, len(events)
            kept += events + active
        ctx.save_for_backward(*kept)
        return current

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        given, weight, bias, scale, shift, winners, *kept = ctx.saved_tensors
        conv, needs, nu = ctx.conv, ctx.needs_input_grad[4:], grads[0].contiguous()
        x = given if ctx.train_like is None else _train(ctx.train_like, kept)
        if torch.is_grad_enabled():  # the gradient is to be differentiated again
            leaves = given, weight, bias, scale, shift
            return (None, None, None, None, *_differentiable(conv, x, leaves, nu, needs))
        with without_autocast():
            through = weight if scale is None else weight * of_channels(scale, weight)
            sums = needs[1] or needs[3], needs[2] or needs[4] or (needs[3] and bias is not None)
            if ctx.backend is None:
                of_input, *others = library.backward(conv, x, through, nu, winners, (needs[0], *sums))
            else:
                wanted = "none" if not needs[0] else "dense" if x.active is None else "active"
                *others, of_input = ctx.backend.convolution_backward(
                    conv, x, through, nu, winners, weight_grad=sums[0], bias_grad=sums[1], input=wanted
                )
            g_weight, of_shift = others
            g_bias, of_scale = of_shift, None
            if scale is not None:
                g_weight, g_bias, of_scale = apart(g_weight, of_shift, weight, bias, scale)
        found = (
            None if of_input is None else of_input.view(given.shape),
            g_weight,
            g_bias,
            of_scale,
            of_shift,
        )
        return (None, None, None, None, *(g if need else None for g, need in zip(found, needs, strict=True)))


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
    """Gradients of the leaves (input, weight, bias, scale, shift) that can be differentiated again, from the
    convolution in plain torch."""
    with torch.enable_grad():
        # views, as the user may want the gradient of one that is made of another
        given, weight, bias, scale, shift = (
            t.view_as(t) if need and t is not None else t for t, need in zip(leaves, needs, strict=True)
        )
        dense = with_carrier(x, given if needs[0] else None) if isinstance(x, SpikeTrain) else given
        rows = dense.reshape(-1, conv.in_channels, *conv.size)  # type: ignore[union-attr]
        norm = None if scale is None or shift is None else Norm.of(scale, shift)
        out = convolved(conv, rows, weight, bias, norm)  # type: ignore[arg-type]
        wanted = [t for t, need in zip((given, weight, bias, scale, shift), needs, strict=True) if need]
        found = iter(torch.autograd.grad(out, wanted, nu.view_as(out), create_graph=True))  # type: ignore[arg-type]
    return [next(found) if need else None for need in needs]
