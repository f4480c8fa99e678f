"""How an input meets its weights: as events whose rows are added, or as one dense product."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core import registry
from ...core.host import waits
from ...core.spikes import SpikeTrain

DENSE_ABOVE = (
    0.4  # input density above which a dense product beats adding rows; `snn-sparse bench --sweep density`
)

LARGE_FOR = (96, 1 << 18), (320, 1 << 20)
"""Up to so many rows of an input one product takes less time with a weight of so many numbers or more: with 2048 · 512
and 5 % of spikes a training step of 80 rows takes 0.5 times, of 200 rows 0.65 times as long, of 800 rows the same."""

SAMPLE = 16384  # numbers that are looked at: so few that torch counts them on this thread

FEW_ROWS = 16  # up to so many rows of an input one dense product takes less time than to turn the weight over


def are_few(x: Tensor | SpikeTrain) -> bool:
    """Whether an input (T, B, ...) on a CPU has so few rows, and needs no gradient, that zeros may be multiplied."""
    return x.shape[0] * x.shape[1] <= FEW_ROWS and not torch.is_grad_enabled() and not waits(x)  # type: ignore[arg-type]


def events_or_product(
    x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[SpikeTrain | None, Tensor | None]:
    """Events of a sparse input (T, B, M), or the current (T, B, N) of a dense, constant or differentiable one."""
    if x.numel() == 0 or (x.requires_grad and torch.is_grad_enabled()):
        return None, F.linear(x, weight, bias)
    if is_still(x):
        return None, F.linear(x[0], weight, bias).expand(x.shape[0], -1, -1)
    train = None if _turns_longer(x, weight) else _sparse(x)
    return (None, F.linear(x, weight, bias)) if train is None else (train, None)


def how_to_multiply(
    x: Tensor, weight: Tensor, bias: Tensor | None, takes_dense: bool
) -> tuple[SpikeTrain | None, Tensor | None, Tensor | None]:
    """An input (T, B, M) as (events, dense input, current (T, B, N)), two of them None.

    ``takes_dense``: the backend is for a device that is not to be waited for, which a look at the numbers would do.
    """
    if takes_dense and x.numel() and not is_still(x):
        return None, x, None
    train, current = events_or_product(x, weight, bias)
    return (None if train is None else train.flatten()), None, current


def is_still(x: Tensor) -> bool:
    """Whether all steps are one tensor without a gradient, which need be multiplied only once."""
    return x.shape[0] > 1 and x.stride(0) == 0 and not (x.requires_grad and torch.is_grad_enabled())


def _turns_longer(x: Tensor, weight: Tensor) -> bool:
    """Whether to turn the weight over, and its gradient back, takes longer than to multiply so few rows (T * B)."""
    rows, size = x.shape[0] * x.shape[1], weight.numel()
    return any(rows <= few and size >= large for few, large in LARGE_FOR)


def _sparse(x: Tensor) -> SpikeTrain | None:
    """The events of an input (T, B, M); None where it is denser than :data:`DENSE_ABOVE`."""
    in_order = x.dtype in (torch.float32, torch.float64) and x.is_contiguous()
    kernels = registry.conversions(x.device.type) if in_order else None
    begun = getattr(x, "_snn_begun", None)
    if kernels is not None and begun is None and x.numel() <= kernels.SMALLEST:  # a sample would take as long
        found = kernels.few_events(x, int(DENSE_ABOVE * x.numel()))
        return None if found is None else SpikeTrain._of_dense(found, x)
    few = begun is not None and begun.has_found_few(x)
    return SpikeTrain.from_dense(x) if few or not _looks_dense(x, kernels) else None


def _looks_dense(x: Tensor, kernels: Any) -> bool:
    """Whether a sample of the rows is denser than :data:`DENSE_ABOVE`."""
    T, B, M = x.shape
    every = max(1, T * B // max(1, min(64, SAMPLE // M)))
    if kernels is not None:
        share: float = kernels.share_of_nonzeros(x, every)
    else:
        sample = x.flatten(0, 1)[::every]
        share = float(sample.count_nonzero()) / sample.numel()
    return share > DENSE_ABOVE
