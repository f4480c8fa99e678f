"""CSR patterns over rows ``b * T + t``: what spike events, and lists of active neuron-steps, are kept in."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import InputError

MAX_EVENTS = 2**31 - 1


class Active(NamedTuple):
    """The neuron-steps near threshold of the layer that emitted a train, CSR over the same rows as the events."""

    indptr: Tensor
    indices: Tensor


def check_csr(indptr: Tensor, indices: Tensor, features: int) -> None:
    """Raise :class:`InputError` unless every row lies inside ``indices`` and rises strictly below ``features``."""
    counts = indptr[1:] - indptr[:-1]
    if int(indptr[0]) != 0 or bool((counts < 0).any()) or int(indptr[-1]) != indices.numel():
        raise InputError(
            f"indptr must rise from 0 to the number of events, {indices.numel()}; "
            f"it goes from {int(indptr[0])} to {int(indptr[-1])}{' and falls' if bool((counts < 0).any()) else ''}."
        )
    if not indices.numel():
        return
    if int(indices.min()) < 0 or int(indices.max()) >= features:
        raise InputError(
            f"indices must lie in 0…{features - 1}, found {int(indices.min())}…{int(indices.max())}."
        )
    rises = indices[1:] > indices[:-1]
    rises[indptr[1:-1][(indptr[1:-1] > 0) & (indptr[1:-1] < indices.numel())].long() - 1] = True  # a new row
    if not bool(rises.all()):
        raise InputError("indices must increase within a row, each neuron at most once.")


def at_active(x: Tensor, active: Active) -> Tensor:
    """The values of ``x`` (T, B, N) at the active neuron-steps, (entries,), in the order of the list."""
    T = max(len(x), 1)
    rows, columns = coordinates(*active)
    return x[rows % T, rows // T, columns]


def coordinates(indptr: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Row ``b * T + t`` and column of every entry of a CSR pattern, int64."""
    counts = (indptr[1:] - indptr[:-1]).long()
    rows = torch.arange(counts.numel(), device=counts.device)
    return torch.repeat_interleave(rows, counts, output_size=indices.numel()), indices.long()


def cells(indptr: Tensor, indices: Tensor, shape: torch.Size) -> Tensor:
    """Sample and neuron, ``b * N + n``, of every entry of a CSR pattern over rows ``b * T + t``."""
    T, B, *features = shape
    N = math.prod(features)
    per_sample = indptr[::T].diff() if T else indptr.new_zeros(B)
    first = torch.arange(B, device=indptr.device) * N
    return torch.repeat_interleave(first, per_sample, output_size=indices.numel()) + indices


class Picked(NamedTuple):
    """Entries of some rows of a pattern."""

    row: Tensor
    positions: Tensor


def entries(indptr: Tensor, rows: Tensor) -> Picked:
    """The entries of some rows of a CSR pattern: which of the rows, and position in ``indices``."""
    first = indptr[rows].long()
    counts = indptr[rows + 1].long() - first
    row = torch.repeat_interleave(torch.arange(len(rows), device=rows.device), counts)
    before = counts.cumsum(0) - counts
    return Picked(row, torch.arange(len(row), device=rows.device) - before[row] + first[row])


def check_float(x: Tensor, what: str) -> None:
    """Raise :class:`InputError` unless ``x`` has a real floating dtype."""
    if not x.is_floating_point():
        raise InputError(f"{what} must have a floating dtype, got {x.dtype}; convert it with .float().")


def events_from_dense(x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """indptr, indices and, unless every spike is 1, values of a dense tensor (T, B, N...)."""
    T, B, N = *x.shape[:2], math.prod(x.shape[2:])
    rows = x.reshape(T, B, N).transpose(0, 1).reshape(T * B, N)
    row, column = rows.nonzero(as_tuple=True)
    indptr = torch.zeros(T * B + 1, dtype=torch.int64, device=x.device)
    indptr[1:] = torch.bincount(row, minlength=T * B).cumsum(0)
    values = rows[row, column]
    return int32(indptr), int32(column), None if bool((values == 1).all()) else values


def events_from_coo(x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """indptr, indices and, unless every spike is 1, values of a coalesced COO tensor (T, B, N...)."""
    T, B, features = x.shape[0], x.shape[1], x.shape[2:]
    places, values = x.indices(), x.values()
    column = torch.zeros_like(places[0])
    for size, index in zip(features, places[2:], strict=True):
        column = column * size + index
    row = places[1] * T + places[0]
    keep = values != 0
    row, column, values = row[keep], column[keep], values[keep]
    order = torch.argsort(row * math.prod(features) + column)
    indptr = torch.zeros(T * B + 1, dtype=torch.int64, device=x.device)
    indptr[1:] = torch.bincount(row, minlength=T * B).cumsum(0)
    graded = None if bool((values == 1).all()) else values[order].contiguous()
    return int32(indptr), int32(column[order]), graded


def int32(x: Tensor) -> Tensor:
    """Row pointers or indices as a pattern keeps them; more than ``MAX_EVENTS`` raise :class:`InputError`."""
    if x.numel() and int(x.max()) > MAX_EVENTS:
        raise InputError(f"more than {MAX_EVENTS} events in one train; split the batch.")
    return x.to(torch.int32).contiguous()
