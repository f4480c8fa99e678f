"""Temporal kernels: what a spike at step t is worth, and the threshold that falls with it.

Every kernel is one shape, moved and stretched: ``eps_k = shape((t_d - k) / tau)`` for the steps k = 0…T-1 of a
window. A neuron fires at the first step whose threshold it reaches, so one table encodes and decodes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.errors import ConfigError
from .library import makes_tables, table_op

SILENT = 255
"""The spike time, one byte, of a neuron that does not fire."""
MAX_WINDOW = 255
ROUNDINGS = {"ceil": 0.0, "nearest": 0.5, "floor": 1.0}
"""How far, in steps, the threshold runs ahead of the value: t = ceil, round or floor of the exact firing time."""


@dataclass(frozen=True)
class Kernel:
    """A temporal kernel ``eps(t) = shape((t_d - t) / tau)``.

    Args:
        name: how layers ask for it.
        shape: rising function of u = (t_d - t) / tau, elementwise.
        inverse: u of a value.
        slope: d shape / du as a function of the value.
        rate: shape is ``exp(rate * u)``, or for 0 ``1 + u``: the fused ops know these two. None runs in plain torch.
    """

    name: str
    shape: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    rate: float | None = None


def under_torch_func() -> bool:
    """Whether a transform of torch.func is at work: torch.library's autograd does not pass through one."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def _exponential(name: str, rate: float) -> Kernel:
    return Kernel(
        name,
        lambda u: torch.exp(rate * u),
        lambda value: torch.log(value) / rate,
        lambda value: rate * value,
        rate,
    )


_LINEAR = Kernel("linear", lambda u: 1 + u, lambda value: value - 1, torch.ones_like, 0.0)


def family(rate: float) -> Kernel:
    """The kernel that the fused ops compute for a rate."""
    return _LINEAR if rate == 0 else _exponential("exp", rate)


_KERNELS = {
    "exp": _exponential("exp", 1.0),
    # with tau = 1 and t_d = 0 every value is a power of two: a shift in hardware
    "power-of-two": _exponential("power-of-two", math.log(2.0)),
    "linear": _LINEAR,
}


def register_kernel(kernel: Kernel) -> None:
    """Make a kernel known by its name; it runs in plain torch unless it gives ``rate``.

    Raises:
        ConfigError: the name is taken.

    Example:
        >>> shape, inverse, slope = lambda u: (2 + u) ** 2, lambda v: v.sqrt() - 2, lambda v: 2 * v.sqrt()
        >>> square = Kernel("doc-square", shape, inverse, slope)
        >>> register_kernel(square)
        >>> get_kernel("doc-square").name
        'doc-square'
    """
    if kernel.name in _KERNELS:
        raise ConfigError(f"there is a kernel {kernel.name!r} already; kernels are {', '.join(_KERNELS)}.")
    _KERNELS[kernel.name] = kernel


def get_kernel(name: str) -> Kernel:
    """The kernel of that name; raises :class:`ConfigError` naming those there are."""
    if name not in _KERNELS:
        raise ConfigError(f"no TTFS kernel {name!r}; kernels are {', '.join(_KERNELS)}.")
    return _KERNELS[name]


def spike_table(
    kernel: Kernel,
    window: int,
    tau: Tensor | float,
    t_d: Tensor | float,
    *,
    rounding: str = "ceil",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Thresholds (row 0) and values (row 1) of every step, (2, window), falling.

    Computed in float64, rounded once to ``dtype``. Values are kept above 0 and finite, so that no parameter makes a
    neuron fire at nothing.
    """
    ahead = ROUNDINGS[rounding]
    if kernel.rate is not None and not under_torch_func() and makes_tables(tau, t_d):
        return table_op(tau.detach(), t_d.detach(), window, ahead, kernel.rate, dtype)  # type: ignore[union-attr]
    tau, t_d = (torch.as_tensor(p).detach().double() for p in (tau, t_d))
    steps = torch.arange(window, dtype=torch.float64, device=tau.device)
    value = kernel.shape((t_d - steps) / tau)
    threshold = value if ahead == 0 else kernel.shape((t_d - steps - ahead) / tau)
    table = torch.stack([threshold, value])
    info = torch.finfo(dtype)
    return table.clamp(info.tiny, info.max).to(dtype)
