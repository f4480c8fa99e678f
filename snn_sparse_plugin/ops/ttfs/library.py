"""The op in torch.library: fake kernels, straight-through autograd; the backend is chosen when it runs."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from ...backends import select
from ...core.backend import RunsTtfs, TtfsBackward
from ...core.config import current_config


def _backend(x: Tensor, name: str) -> RunsTtfs:
    found = select(name or current_config().backend, "ttfs", device=x.device, dtype=x.dtype)
    return cast(RunsTtfs, found)


def _like(x: Tensor, like: Tensor) -> Tensor:
    """``x`` dense and in the memory order of ``like``: kernels walk all their tensors as one row."""
    if x.stride() == like.stride() and x.data_ptr() % x.element_size() == 0:
        return x
    return torch.empty_like(like, dtype=x.dtype).copy_(x)


@torch.library.custom_op("snn_sparse_plugin::ttfs", mutates_args=())
def _forward(
    x: Tensor, table: Tensor, tau: Tensor, t_d: Tensor, rate: float, backend: str
) -> tuple[Tensor, Tensor]:
    """xhat and spike times, uint8."""
    out, times = torch.empty_like(x), torch.empty_like(x, dtype=torch.uint8)
    _backend(x, backend).ttfs(_like(x, out), table.contiguous(), out, times)
    return out, times


@_forward.register_fake
def _(x, table, tau, t_d, rate, backend):  # type: ignore[no-untyped-def]
    return torch.empty_like(x), torch.empty_like(x, dtype=torch.uint8)


@torch.library.custom_op("snn_sparse_plugin::ttfs_backward", mutates_args=())
def _backward(
    grad: Tensor,
    x: Tensor,
    times: Tensor,
    table: Tensor,
    tau: Tensor,
    t_d: Tensor,
    rate: float,
    params: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, tau and t_d."""
    out = torch.empty_like(x)
    arrays = (_like(grad.to(x.dtype), out), _like(x, out), _like(times, out), table.contiguous())
    d_tau, d_t_d = _backend(x, backend).ttfs_backward(TtfsBackward(*arrays, out, tau, t_d, rate, params))
    return out, torch.empty_like(tau).copy_(d_tau), torch.empty_like(t_d).copy_(d_t_d)


@_backward.register_fake
def _(grad, x, times, table, tau, t_d, rate, params, backend):  # type: ignore[no-untyped-def]
    return torch.empty_like(x), torch.empty_like(tau), torch.empty_like(t_d)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, table, tau, t_d, ctx.rate, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, output[1], table, tau, t_d)


def _autograd(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    params = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
    d_x, d_tau, d_t_d = _backward(grad, *ctx.saved_tensors, ctx.rate, params, ctx.backend)
    return d_x, None, d_tau if params else None, d_t_d if params else None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)

ttfs_op = _forward
