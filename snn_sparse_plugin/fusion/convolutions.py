"""Convolutions of spikes in a record or a sequence: which can be one call over all steps, with the pool behind it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters import has_hooks
from ..core.convolution import Pool
from ..core.errors import InputError
from ..core.precision import any_autocast
from ..core.spikes import SpikeTrain
from ..ops.spiking_conv import (
    NORMS,
    Norm,
    average_pool,
    convolve,
    equal_padding,
    max_pool,
    norm_of,
    pool_events,
    pool_of,
    pools_events,
)
from .modules import is_unchanged
from .recordable import Placeholder, functions

_CONVOLUTIONS = [functions(f"conv{dims}d") for dims in (1, 2, 3)]
_MAX_POOLS = [functions(f"max_pool{dims}d") for dims in (1, 2, 3)]
_AVERAGES = [functions(f"avg_pool{dims}d") for dims in (1, 2, 3)]
_BATCH_NORM = F.batch_norm
CONVOLUTIONS = set.union(*_CONVOLUTIONS)
POOLS = set.union(*_MAX_POOLS, *_AVERAGES)
_MODULES = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_POOL_MODULES = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
TAKEN = (torch.float32, torch.float64)


class Convolved(NamedTuple):
    """The arguments of a convolution. ``weight`` and ``bias``: tensors, or placeholders of a recorded call."""

    weight: Any
    bias: Any
    stride: Any
    padding: Any
    dilation: Any
    groups: int

    def run(self, flow: Tensor | SpikeTrain, norm: Norm | None, pool: Pool | None, name: str) -> Tensor:
        """Of all steps (T, B, C, *size), with the batch norm and the pool behind it."""
        out: Tensor = convolve(
            *(flow, self.weight, self.bias),
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            norm=norm,
            pool=pool,
            name=name,
        )
        return out


# --- as functions ---


def recorded(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Convolved | None:
    """A call of a convolution as it was written down; None for another call, or one that only torch knows to run."""

    def of(
        input: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Convolved | None:
        fits = isinstance(input, Placeholder) and isinstance(weight, Placeholder)
        return Convolved(weight, bias, stride, padding, dilation, groups) if fits else None

    return _bound(of, args, kwargs) if func in CONVOLUTIONS else None


def norm_recorded(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Norm | None:
    """The batch norm of a recorded call, which has running statistics; None for another call."""

    def of(
        input: Any,
        running_mean: Any,
        running_var: Any,
        weight: Any = None,
        bias: Any = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Norm | None:
        whole = not training and running_mean is not None and running_var is not None
        return Norm(running_mean, running_var, weight, bias, eps) if whole else None

    return _bound(of, args, kwargs) if func is _BATCH_NORM else None


def pool_recorded(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Pool | None:
    """The pool of a recorded call; None for another call, or one that returns indices."""
    for dims in (1, 2, 3):
        for home, make in ((_MAX_POOLS, max_pool), (_AVERAGES, average_pool)):
            if func in home[dims - 1] and args and isinstance(args[0], Placeholder):
                found: Pool | None = _bound(make, (dims, *args[1:]), kwargs)
                return found
    return None


def _bound(make: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    try:
        return make(*args, **kwargs)
    except (TypeError, InputError):  # torch's own words, when it runs
        return None


def pooled_events(flow: Tensor | SpikeTrain | None, pool: Pool | None) -> SpikeTrain | None:
    """The pool of all steps as events; None where it is torch's to make it."""
    if pool is None or not isinstance(flow, SpikeTrain) or not pools_events(flow, pool):
        return None
    return pool_events(flow, pool)


def is_even(found: Convolved, kernel: tuple[int, ...]) -> bool:
    """Whether as many zeros stand on either side."""
    widen = found.dilation if isinstance(found.dilation, tuple | list) else (found.dilation,) * len(kernel)
    widen = tuple(widen) * len(kernel) if len(widen) == 1 else tuple(widen)
    return equal_padding(found.padding, kernel, widen) is not None


# --- as modules ---


def of_module(module: nn.Module | None) -> Convolved | None:
    """A plain convolution of torch's whose zeros stand evenly; None for any other module."""
    if not is_unchanged(module, _MODULES) or has_hooks(module) or module.padding_mode != "zeros":  # type: ignore[arg-type, union-attr]
        return None
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    found = Convolved(
        *(module.weight, module.bias, module.stride, module.padding, module.dilation, module.groups)
    )
    return found if is_even(found, module.kernel_size) else None


def pool_of_module(module: nn.Module | None, dims: int) -> Pool | None:
    """The pool of a plain module of torch's; None for any other module."""
    if not is_unchanged(module, _POOL_MODULES) or has_hooks(module):  # type: ignore[arg-type]
        return None
    try:
        return pool_of(module, dims)
    except InputError:
        return None


def norm_of_module(module: nn.Module | None, dims: int) -> Norm | None:
    """What a plain batch norm of torch's does in eval mode; None for any other module."""
    if not is_unchanged(module, NORMS[dims - 1 : dims]) or has_hooks(module):  # type: ignore[arg-type]
        return None
    assert module is not None
    return None if module.training or module.running_mean is None else norm_of(module, dims, "norm")


def fits(norm: Norm | None, weight: Tensor) -> bool:
    """Whether each of its numbers belongs to a channel of this weight; if not, torch says what is wrong."""
    return norm is not None and all(
        x is None or (x.shape, x.dtype, x.device) == (weight.shape[:1], weight.dtype, weight.device)
        for x in norm[:4]
    )


def spike_pool_of_module(module: nn.Module | None) -> Pool | None:
    """The pool of a plain pool of torch's, of any number of dimensions; None for any other module."""
    for dims in (1, 2, 3):
        kinds = _POOL_MODULES[dims - 1], _POOL_MODULES[dims + 2]
        pool = pool_of_module(module, dims) if isinstance(module, kinds) else None
        if pool is not None:
            return pool
    return None


def takes(weight: Tensor, flow: Tensor | SpikeTrain) -> bool:
    """Whether the op runs on this flow (T, B, C, *size); in half precision torch's own product is taken."""
    return (
        len(flow.shape) == weight.dim() + 1
        and flow.dtype in TAKEN
        and flow.dtype == weight.dtype
        and flow.device == weight.device
        and not any_autocast()
        and 0 not in flow.shape
        and not torch.compiler.is_compiling()
    )


# --- what keeps events events ---

RESHAPES = functions("flatten unflatten reshape view view_as")


def keeps_samples(func: Any, before: torch.Size, after: torch.Size) -> bool:
    """Whether a function at most gives each sample another shape."""
    return func in RESHAPES and len(before) > 1 and len(after) > 1 and before[0] == after[0]
