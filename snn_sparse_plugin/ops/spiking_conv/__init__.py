"""Convolutions of spikes over all steps, and the op that has neurons behind one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core.backend import is_finite
from ...core.convolution import Convolution, Pool
from ...core.errors import InputError, NonFiniteError
from ...core.spikes import SpikeTrain, as_spike_train, check_float, is_sparse_input
from ..spiking_layer import SpikingLayerOutput, spiking_layer
from ..spiking_layer.products import is_still
from . import autograd
from .geometry import Size, average_pool, equal_padding, geometry, max_pool, pool_of
from .norm import NORMS, Norm, check_norm, norm_of
from .pooling import max_pool_events, pool_events, pools_events
from .reference import convolved
from .selection import takes_events

__all__ = [
    "NORMS",
    "Convolution",
    "Norm",
    "Pool",
    "average_pool",
    "convolve",
    "equal_padding",
    "max_pool",
    "max_pool_events",
    "norm_of",
    "pool_events",
    "pool_of",
    "pools_events",
    "spiking_conv",
    "takes_events",
]


def spiking_conv(
    x: Tensor | SpikeTrain | Any,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    norm: Any = None,
    pool: Any = None,
    name: str = "spiking_conv",
    **neurons: Any,
) -> SpikingLayerOutput:
    """A convolution, a pool and a layer of spiking neurons over T steps.

    Events are added row by row, so that the work is that of the spikes [Perez-Nieves & Goodman 2021 could only simulate
    it]. The map before the pool exists for one sample and step at a time.

    Args:
        x: input (T, B, C, *size) with one to three dimensions of size, dense or a SpikeTrain, float32 or float64.
        weight: (C', C / groups, *kernel), as of ``nn.Conv1d``, ``2d`` and ``3d``. ``bias``: (C',).
        stride, padding, dilation, groups: as of ``nn.Conv2d``, with padding by zeros.
        norm: a module ``nn.BatchNorm1d``, ``2d`` or ``3d`` in eval mode between convolution and pool.
        pool: a module ``nn.MaxPool1d``, ``2d``, ``3d`` or ``nn.AvgPool1d``, ``2d``, ``3d`` before the neurons.
        name: how error messages call this layer.
        **neurons: all else that :func:`~snn_sparse_plugin.ops.spiking_layer` takes: ``params``, ``spec``,
            ``surrogate``, ``state``, ``events``, ``return_mem``, options of the sparse mode.

    Returns:
        As :func:`~snn_sparse_plugin.ops.spiking_layer`; neurons have the shape (C', *out).

    Raises:
        InputError: shapes, dtypes or devices that do not fit.

    Example:
        >>> from snn_sparse_plugin import NeuronParams
        >>> x = (torch.rand(20, 4, 2, 10, 10) < 0.05).float()
        >>> w = torch.randn(8, 2, 3, 3, requires_grad=True)
        >>> out = spiking_conv(x, w, padding=1, pool=torch.nn.MaxPool2d(2), params=NeuronParams(mem=0.9))
        >>> out.spikes.shape, out.state.v.shape
        (torch.Size([20, 4, 8, 5, 5]), torch.Size([4, 8, 5, 5]))
        >>> out.spikes.sum().backward(); w.grad.shape
        torch.Size([8, 2, 3, 3])
    """
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    current = convolve(x, weight, bias, norm=norm, pool=pool, name=name, **options)  # type: ignore[arg-type]
    return spiking_layer(current, name=name, **neurons)


def convolve(
    x: Tensor | SpikeTrain | Any,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    norm: Any = None,
    pool: Any = None,
    name: str = "convolve",
) -> Tensor:
    """The current (T, B, C', *out) of :func:`spiking_conv`, before the neurons; arguments as there.

    Example:
        >>> x = (torch.rand(20, 4, 2, 10) < 0.05).float()
        >>> convolve(SpikeTrain.from_dense(x), torch.randn(8, 2, 3), stride=2).shape
        torch.Size([20, 4, 8, 4])
    """
    if is_sparse_input(x):
        x = as_spike_train(x)
    elif isinstance(x, Tensor):
        check_float(x, f"{name}: x")
    else:
        raise InputError(f"{name}: x must be a tensor or a SpikeTrain, got {type(x).__name__}.")
    conv = geometry(
        *(x, weight, bias),
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        pool=pool,
        name=name,
    )
    norm = norm_of(norm, len(conv.size), name)
    check_norm(norm, weight, name)
    if torch.compiler.is_compiling():
        x = x.to_dense() if isinstance(x, SpikeTrain) else x
        return convolved(conv, x.flatten(0, 1), weight, bias, norm).unflatten(0, x.shape[:2])
    if isinstance(x, Tensor) and is_still(x):
        still = autograd.convolve(conv, x[:1], weight, bias, None, norm)
        return still.expand(len(x), *still.shape[1:])
    backend = takes_events(x)
    # a weight that no event reaches would not be seen to be NaN
    if backend is None or not is_finite(weight):
        return autograd.convolve(conv, x, weight, bias, None, norm)
    if isinstance(x, Tensor):
        if not backend.prefers_events(conv, _share(x), masked=False):
            return autograd.convolve(conv, x, weight, bias, None, norm)
        try:
            x = SpikeTrain.from_dense(x)
        except NonFiniteError:  # torch's product carries them on
            backend = None
    elif not backend.prefers_events(conv, x.density, masked=x.active is not None):
        backend = None
    return autograd.convolve(conv, x, weight, bias, backend, norm)


def _share(x: Tensor) -> float:
    """How many of the numbers are not zero, seen on a few samples and steps."""
    rows = x.flatten(0, 1)
    some = rows[:: max(1, len(rows) // 32)]
    return float(some.count_nonzero()) / max(1, some.numel())
