"""Time-to-first-spike coding as one op: what an activation becomes when it travels as a single spike."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core.errors import InputError
from ...core.precision import state_dtype
from ...core.spikes import check_float
from . import reference
from .kernels import (
    MAX_WINDOW,
    ROUNDINGS,
    SILENT,
    Kernel,
    get_kernel,
    register_kernel,
    spike_table,
    under_torch_func,
)
from .library import ttfs_op

__all__ = [
    "MAX_WINDOW",
    "ROUNDINGS",
    "SILENT",
    "Kernel",
    "check_pre_activation",
    "get_kernel",
    "register_kernel",
    "spike_table",
    "ttfs",
    "under_torch_func",
]


def check_pre_activation(x: Tensor) -> None:
    """Raise :class:`InputError` unless ``x`` is a floating tensor."""
    if not isinstance(x, Tensor):
        raise InputError(f"a pre-activation is a torch.Tensor, got {type(x).__name__}.")
    check_float(x, "a pre-activation")


def ttfs(
    x: Tensor,
    table: Tensor,
    tau: Tensor,
    t_d: Tensor,
    *,
    kernel: str = "exp",
    backend: str = "",
) -> tuple[Tensor, Tensor]:
    """Encode ``x`` as spike times and decode them again; gradients pass straight through.

    Equations and gradients: :mod:`snn_sparse_plugin.ops.ttfs.reference` (Park & Yoon, arXiv 2106.02568).

    Args:
        x: pre-activations of any shape, floating. Half precisions are computed in float32.
        table: thresholds and values (2, window), falling, of :func:`spike_table`; no gradient passes through it.
        tau, t_d: the kernel's parameters, 0-dimensional, in steps.
        kernel: the name of the kernel that the table was made from.
        backend: ``""`` takes that of the active sparse mode. Under ``torch.func`` the reference runs, in plain torch.

    Returns:
        xhat of x's shape and dtype, and the spike times, uint8 of x's shape: 0…window-1, or 255 for no spike.
        NaN stays NaN and has no spike.

    Raises:
        InputError: integer input, or a table of another form.
        UnsupportedError: a backend asked for by name that cannot run this.

    Example:
        >>> tau, t_d = torch.tensor(10.0), torch.tensor(0.0)
        >>> table = spike_table(get_kernel("exp"), 32, tau, t_d)
        >>> xhat, times = ttfs(torch.tensor([2.0, 0.5, 0.01]), table, tau, t_d)
        >>> times.tolist()
        [0, 7, 255]
    """
    check_pre_activation(x)
    if table.dim() != 2 or table.shape[0] != 2 or not 2 <= table.shape[1] <= MAX_WINDOW:
        raise InputError(f"a spike table has shape (2, 2…{MAX_WINDOW}), got {tuple(table.shape)}.")
    found = get_kernel(kernel)
    dtype = state_dtype(x.dtype)
    table = table.detach().to(dtype)
    if found.rate is None or under_torch_func():
        out, times = _Plain.apply(x.to(dtype), table, tau, t_d, found)
        return out.to(x.dtype), times
    return ttfs_op(x, table, tau, t_d, found.rate, backend)


class _Plain(torch.autograd.Function):
    """The reference as it stands: for kernels that the fused op does not know, and under torch.func."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, table: Tensor, tau: Tensor, t_d: Tensor, kernel: Kernel) -> tuple[Tensor, Tensor]:
        return reference.forward(x, table)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        x, table, tau, t_d, ctx.kernel = inputs
        ctx.save_for_backward(x, output[1], table, tau, t_d)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, times, table, tau, t_d = ctx.saved_tensors
        d_x, d_tau, d_t_d = reference.backward(grads[0], x, times, table, tau, t_d, ctx.kernel)
        return d_x, None, d_tau, d_t_d, None
