"""Gradients of a spike train's dense forms: at the active neuron-steps where there is a list of them, else dense."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .csr import at_active, cells, entries

if TYPE_CHECKING:
    from .spikes import SpikeTrain


class ToDense(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, carrier: Tensor, train: SpikeTrain) -> Tensor:
        ctx.active, ctx.shape = train.active, train.shape
        return train._dense_data()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        T, B, *features = ctx.shape
        grad = grads[0].reshape(T, B, math.prod(features))
        if ctx.active is None:
            return grad, None
        return at_active(grad, ctx.active), None


class Counts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, carrier: Tensor, train: SpikeTrain) -> Tensor:
        ctx.active, ctx.shape, ctx.kernels = train.active, train.shape, train._kernels()
        return train._counts()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        T, B, *features = ctx.shape
        if ctx.active is None:
            return grads[0].reshape(1, B, math.prod(features)).expand(T, -1, -1), None
        indptr, indices = ctx.active
        if ctx.kernels is not None:
            return ctx.kernels.pick_counts(indptr, indices, grads[0].reshape(B, math.prod(features)), T), None
        return grads[0].flatten()[cells(indptr, indices, ctx.shape)], None


class Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, carrier: Tensor, train: SpikeTrain, t: int) -> Tensor:
        ctx.active, ctx.shape, ctx.step, ctx.steps = train.active, carrier.shape, t, train.T
        return train.values_at(t)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        grad = grads[0].flatten(1)
        out = grad.new_zeros(ctx.shape)
        if ctx.active is None:
            out[ctx.step] = grad
        else:
            rows = torch.arange(len(grad), device=grad.device) * ctx.steps + ctx.step
            picked = entries(ctx.active.indptr, rows)
            out[picked.positions] = grad[picked.row, ctx.active.indices.long()[picked.positions]]
        return out, None, None
