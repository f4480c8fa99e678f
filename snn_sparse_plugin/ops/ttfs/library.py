"""The op in torch.library: fake kernels, straight-through autograd; the backend is chosen when it runs.

Kept for the backward are x and one byte an element. Half precisions go to a backend as they are where it takes them.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, cast

import torch
from torch import Tensor

from ...backends import select
from ...core.backend import RunsTtfs, TtfsBackward
from ...core.config import current_config
from ...core.host import is_device


def _backend(x: Tensor, table: Tensor, name: str) -> tuple[RunsTtfs, torch.dtype]:
    """Who runs it, and the dtype that x is handed over in."""
    found = select(name or current_config().backend, "ttfs", device=x.device, dtype=table.dtype)
    return cast(RunsTtfs, found), x.dtype if found.takes_half(x.device, x.dtype) else table.dtype


def _like(x: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` dense and in the memory order of ``like``: kernels walk all their tensors as one row."""
    if x.dtype == dtype and x.stride() == like.stride() and x.data_ptr() % x.element_size() == 0:
        return x
    return torch.empty_like(like, dtype=dtype).copy_(x)


def _same(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Room for what a backend writes in ``dtype``: ``x`` itself where it has that."""
    return x if x.dtype == dtype else torch.empty_like(x, dtype=dtype)


@torch.library.custom_op("snn_sparse_plugin::ttfs", mutates_args=())
def _forward(
    x: Tensor, table: Tensor, tau: Tensor, t_d: Tensor, rate: float, backend: str
) -> tuple[Tensor, Tensor]:
    """xhat and spike times, uint8."""
    out, times = torch.empty_like(x), torch.empty_like(x, dtype=torch.uint8)
    runs, dtype = _backend(x, table, backend)
    written = _same(out, dtype)
    runs.ttfs(_like(x, out, dtype), table.contiguous(), written, times)
    return out if written is out else out.copy_(written), times


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
    """Gradients of x, tau and t_d, those of the parameters empty unless they are wanted."""
    out = torch.empty_like(x)
    runs, dtype = _backend(x, table, backend)
    written = _same(out, dtype)
    arrays = _like(grad, out, dtype), _like(x, out, dtype), _like(times, out, times.dtype), table.contiguous()
    found = runs.ttfs_backward(TtfsBackward(*arrays, written, tau, t_d, rate, params))
    out = out if written is out else out.copy_(written)
    if not params:
        return out, tau.new_empty(0), t_d.new_empty(0)
    return out, *(_made(g, p) for g, p in zip(found, (tau, t_d), strict=True))  # type: ignore[return-value]


def _made(grad: Tensor, like: Tensor) -> Tensor:
    """A parameter's gradient as the op may return it: of its dtype, and no part of another tensor."""
    same = (grad.dtype, grad.device, grad.shape) == (like.dtype, like.device, like.shape)
    return grad if same and not grad._is_view() else torch.empty_like(like).copy_(grad)


@_backward.register_fake
def _(grad, x, times, table, tau, t_d, rate, params, backend):  # type: ignore[no-untyped-def]
    shape = () if params else (0,)
    return torch.empty_like(x), tau.new_empty(shape), t_d.new_empty(shape)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, table, tau, t_d, ctx.rate, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros for the times
    ctx.save_for_backward(x, output[1], table, tau, t_d)


def _autograd(ctx: Any, grad: Tensor | None, _: Tensor) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None, None, None
    params = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
    d_x, d_tau, d_t_d = _backward(grad, *ctx.saved_tensors, ctx.rate, params, ctx.backend)
    return d_x, None, d_tau if params else None, d_t_d if params else None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)

ttfs_op = _forward


@torch.library.custom_op("snn_sparse_plugin::ttfs_table", mutates_args=())
def table_op(tau: Tensor, t_d: Tensor, window: int, ahead: float, rate: float, dtype: torch.dtype) -> Tensor:
    """Thresholds and values (2, window) in one launch; :func:`makes_tables` says where."""
    kernels: Any = import_module("snn_sparse_plugin.triton_kernels.ttfs")
    return kernels.table(tau, t_d, window, ahead, rate, dtype)  # type: ignore[no-any-return]


@table_op.register_fake
def _(tau, t_d, window, ahead, rate, dtype):  # type: ignore[no-untyped-def]
    return tau.new_empty((2, window), dtype=dtype)


def makes_tables(tau: Any, t_d: Any) -> bool:
    """Whether both are numbers on a device that a kernel runs on, so that a dozen launches become one."""
    if not (isinstance(tau, Tensor) and isinstance(t_d, Tensor) and tau.device == t_d.device):
        return False
    if not is_device(tau.device) or tau.numel() != 1 or t_d.numel() != 1:
        return False
    return select("auto", "ttfs", device=tau.device, dtype=torch.float32).name == "triton"
