"""What a loss is made of: spikes and membranes (T, B, N...) over each sample's own steps, without the padded ones.

``lengths`` are B whole numbers from 0 to T, as :func:`snn_sparse_plugin.unroll` takes them; None counts all steps.
A sample of length 0 gets zeros. Padded steps may hold anything and get no gradient.

Example:
    >>> mem = torch.tensor([[[1.0], [4.0]], [[3.0], [9.0]]])  # T = 2, B = 2, N = 1
    >>> mean(mem, lengths=[2, 1]).flatten().tolist()
    [2.0, 4.0]
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .core.errors import InputError
from .core.lengths import read_lengths
from .core.spikes import SpikeTrain, check_float

__all__ = ["counts", "last", "max", "mean"]


def counts(spikes: Tensor | SpikeTrain, lengths: Any = None) -> Tensor:
    """Spikes of each neuron, (B, N...); of a membrane or graded spikes, the sum. Differentiable.

    Raises:
        InputError: not (T, B, N...), an integer dtype, or lengths that are not B whole numbers in 0…T.

    Example:
        >>> counts(torch.ones(5, 2, 1), lengths=[5, 3]).flatten().tolist()
        [5.0, 3.0]
    """
    if lengths is None and isinstance(spikes, SpikeTrain):
        return spikes.counts()
    x, own, _ = _read(spikes, lengths)
    return _zeroed(x, own).sum(0)


def mean(mem: Tensor | SpikeTrain, lengths: Any = None) -> Tensor:
    """Mean over a sample's own steps, (B, N...); of spikes, their rate per step.

    Raises:
        InputError: as :func:`counts`.

    Example:
        >>> mean(torch.arange(4.0).view(4, 1, 1), lengths=[2]).item()
        0.5
    """
    x, own, steps = _read(mem, lengths)
    return _zeroed(x, own).sum(0) / _per_sample(steps.clamp(min=1), x).to(x.dtype)


def max(mem: Tensor | SpikeTrain, lengths: Any = None) -> Tensor:
    """Largest value of a sample's own steps, (B, N...). The gradient goes to one step, not to all equal ones.

    Raises:
        InputError: as :func:`counts`.

    Example:
        >>> max(torch.arange(4.0).view(4, 1, 1), lengths=[2]).item()
        1.0
    """
    x, own, steps = _read(mem, lengths)
    if not len(x):
        return x.new_zeros(x.shape[1:])
    # not amax, which shares its gradient among equal steps
    highest = x.masked_fill(~own, float("-inf")).max(0).values
    return highest.masked_fill(_per_sample(steps == 0, x), 0.0)


def last(mem: Tensor | SpikeTrain, lengths: Any = None) -> Tensor:
    """The value at a sample's own last step, (B, N...).

    Raises:
        InputError: as :func:`counts`.

    Example:
        >>> last(torch.arange(4.0).view(4, 1, 1), lengths=[3]).item()
        2.0
    """
    x, _, steps = _read(mem, lengths)
    if not len(x):
        return x.new_zeros(x.shape[1:])
    samples = torch.arange(x.shape[1], device=x.device)
    found = x[(steps - 1).clamp(min=0), samples]
    return found.masked_fill(_per_sample(steps == 0, x), 0.0)


def _read(x: Any, lengths: Any) -> tuple[Tensor, Tensor, Tensor]:
    """-> (T, B, N...) dense, which of its steps are the sample's own, and how many these are, (B,)."""
    x = x.to_dense() if isinstance(x, SpikeTrain) else x
    if not isinstance(x, Tensor) or x.dim() < 2:
        found = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise InputError(f"a readout takes a tensor (T, B, N...) or a SpikeTrain, got {found}.")
    check_float(x, "what a readout takes")
    T, B = x.shape[:2]
    steps = torch.full((B,), T) if lengths is None else read_lengths(lengths, T, B)
    steps = steps.to(x.device)
    own = torch.arange(T, device=x.device).unsqueeze(1) < steps
    return x, own.view(T, B, *[1] * (x.dim() - 2)), steps


def _per_sample(values: Tensor, x: Tensor) -> Tensor:
    return values.view(-1, *[1] * (x.dim() - 2))


def _zeroed(x: Tensor, own: Tensor) -> Tensor:
    return x.masked_fill(~own, 0.0)
