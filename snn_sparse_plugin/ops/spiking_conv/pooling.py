"""Pools of spikes: a maximum of spikes is a spike, their average a graded one, so that what was events stays events."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...backends.product import ProductGrad
from ...core.backend import RunsConvolutions, Shares
from ...core.convolution import Convolution, Pool
from ...core.errors import InputError
from ...core.spikes import SpikeTrain
from .geometry import pool_of
from .reference import pooled, with_winners
from .selection import takes_events

MOST_SPIKES = 0.75
"""Spikes of a window up to which its average is made of events. A training step of conv - neuron - average of 2 x 2 -
conv (one core of an AMD EPYC, 2 x 32 x 32) takes 0.7 of the time with 0.12 spikes, 0.87 with 0.5, and as long with more
than one."""


def pool_events(train: SpikeTrain, pool: Any) -> SpikeTrain:
    """The pool of a train (T, B, C, *size), a train (T, B, C, *out).

    Of a max-pool the gradient goes where torch sends it: to the first spike of a window, or in a silent window to its
    first place. An average-pool makes graded events, and every neuron of a window gets its share of the gradient. A
    train with a list of active neuron-steps gets a pool with a list of its own: the windows that have an active
    neuron, of a max-pool those whose winner is active. Trains on a CPU are pooled as events, all others by torch, and
    so are graded ones by a max-pool.

    Args:
        train: one to three dimensions of size.
        pool: ``nn.MaxPool1d``, ``2d`` or ``3d``, ``nn.AvgPool1d``, ``2d`` or ``3d``, or a
            :class:`~snn_sparse_plugin.core.convolution.Pool`.

    Raises:
        InputError: a train without channels and size, or a pool of other dimensions.

    Example:
        >>> x = torch.zeros(5, 2, 3, 4, 4); x[1, 0, 2, 0, 3] = 1
        >>> pool_events(SpikeTrain.from_dense(x), torch.nn.MaxPool2d(2)).to_dense().nonzero().tolist()
        [[1, 0, 2, 0, 1]]
        >>> pool_events(SpikeTrain.from_dense(x), torch.nn.AvgPool2d(2)).values.tolist()
        [0.25]
    """
    dims = len(train.shape) - 3
    if not 1 <= dims <= 3:
        raise InputError(f"a pool of spikes takes (T, B, C, *size), got {tuple(train.shape)}.")
    found = pool_of(pool, dims)
    if found is None:
        raise InputError("a pool of spikes needs a pool, got None.")
    backend = takes_events(train) if pools_events(train, found) else None
    if backend is None:
        dense = pooled(found, train.to_dense().flatten(0, 1))
        return SpikeTrain.from_dense(dense.unflatten(0, train.shape[:2]))
    conv = _geometry(train.shape, found)
    made = backend.pool(conv, train if train.requires_grad else train.detach())
    shape = *train.shape[:3], *conv.out_size
    out = SpikeTrain(
        made.indptr, made.indices, shape, made.values, dtype=train.dtype, active=made.active, check=False
    )
    if train.requires_grad and torch.is_grad_enabled():
        if made.shares is not None:
            entries = made.active.indices.numel()  # type: ignore[union-attr]
            out.carrier = _Share.apply(train.carrier, made.shares, entries)
        else:
            out.carrier = _Pool.apply(train.carrier, train, conv, backend, made.sources)
    return out


def max_pool_events(train: SpikeTrain, pool: Any) -> SpikeTrain:
    """:func:`pool_events` of a max-pool, which leaves spikes.

    Example:
        >>> max_pool_events(SpikeTrain.from_dense(torch.ones(5, 2, 3, 4)), torch.nn.MaxPool1d(2)).density
        1.0
    """
    found = pool_of(pool, len(train.shape) - 3) if 1 <= len(train.shape) - 3 <= 3 else None
    if found is not None and found.kind != "max":
        raise InputError(f"only a max-pool of spikes has spikes, got {pool!r}.")
    return pool_events(train, pool)


def pools_events(train: SpikeTrain, pool: Pool) -> bool:
    """Whether this pool of these spikes is made of events; all others torch makes, or says what is wrong."""
    if len(train.shape) != len(pool.kernel) + 3 or takes_events(train) is None:
        return False
    if pool.kind == "max" and train.values is not None:
        return False
    if pool.kind == "avg" and train.density * math.prod(pool.kernel) > MOST_SPIKES:
        return False
    padded = any(pool.padding)
    # a padding of at most half the kernel leaves no window empty, if nothing is skipped
    fits = all(0 <= 2 * p <= k for p, k in zip(pool.padding, pool.kernel, strict=True))
    skips = any(d != 1 for d in pool.dilation)
    whole = all(n > 0 for n in (*pool.kernel, *pool.stride, *pool.dilation))
    return whole and fits and not (padded and skips) and min(pool.out_size(train.shape[3:])) > 0


def _geometry(shape: torch.Size, pool: Pool) -> Convolution:
    """As of a convolution that changes nothing."""
    C, size = shape[2], tuple(shape[3:])
    one, none = (1,) * len(size), (0,) * len(size)
    return Convolution(C, C, size, one, one, none, one, C, pool)


class _Pool(torch.autograd.Function):
    """From the carrier of a train to that of its pool, whose numbers do not count."""

    @staticmethod
    def forward(
        ctx: Any,
        carrier: Tensor,
        train: SpikeTrain,
        conv: Convolution,
        backend: RunsConvolutions,
        sources: Tensor | None,
    ) -> Tensor:
        ctx.conv, ctx.backend, ctx.shape = conv, backend, train.shape
        ctx.entries = None if sources is None else carrier.shape
        ctx.save_for_backward(*((train.indptr, train.indices) if sources is None else (sources,)))
        shape = (train.T, train.B, conv.out_features) if sources is None else sources.shape
        return carrier.new_zeros(()).expand(shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0].dense() if isinstance(grads[0], ProductGrad) else grads[0]
        if ctx.entries is not None:
            found = grad.new_zeros(ctx.entries).index_add(0, ctx.saved_tensors[0], grad)
        else:
            indptr, indices = ctx.saved_tensors
            train = SpikeTrain(indptr, indices, ctx.shape, dtype=grad.dtype, check=False)
            # in torch's operators where the gradient is to be differentiated again
            again = torch.is_grad_enabled()
            found = _in_torch(ctx.conv, train, grad) if again else _compiled(ctx, train, grad)
        return found, None, None, None, None


class _Share(torch.autograd.Function):
    """From the carrier of a train with a list of active entries to that of its average-pool."""

    @staticmethod
    def forward(ctx: Any, carrier: Tensor, shares: Shares, entries: int) -> Tensor:
        ctx.entries = carrier.shape
        ctx.save_for_backward(*shares)
        return carrier.new_zeros(()).expand(entries)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        below, above, divisor = ctx.saved_tensors
        shared = grads[0].index_select(0, above) / divisor
        return grads[0].new_zeros(ctx.entries).index_add(0, below, shared), None, None


def _compiled(ctx: Any, train: SpikeTrain, grad: Tensor) -> Tensor:
    found: Tensor = ctx.backend.pool_backward(ctx.conv, train, grad.contiguous())
    return found


def _in_torch(conv: Convolution, train: SpikeTrain, grad: Tensor) -> Tensor:
    assert conv.pool is not None
    T, B, C = train.shape[:3]
    if conv.pool.kind == "avg":
        maps = grad.new_zeros(T * B, C, *conv.size).requires_grad_()
        made = pooled(conv.pool, maps)
        return torch.autograd.grad(made, maps, grad.reshape(made.shape), create_graph=True)[0].view(T, B, -1)
    _, winners = with_winners(conv.pool, train.to_dense().flatten(0, 1))
    maps = grad.new_zeros(T * B, C, math.prod(conv.size))
    spread = maps.scatter_add(2, winners.flatten(2), grad.reshape(T * B, C, -1))
    return spread.view(T, B, -1)
