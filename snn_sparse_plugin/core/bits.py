"""Spikes as bits: words (..., ceil(N / 32)) int32, neuron n is bit n % 32 of word n // 32; bits beyond N are 0.

Only :func:`unpack_events` reads numbers on the host, as nothing else can say how many events there are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .csr import MAX_EVENTS, coordinates
from .errors import InputError


def pack(spikes: Tensor) -> Tensor:
    """Bits of dense spikes (..., N): which are not 0."""
    words = -(-spikes.shape[-1] // 32)
    fired = torch.nn.functional.pad(spikes != 0, (0, 32 * words - spikes.shape[-1]))
    # distinct bits, so that their sum is their union
    return (fired.unflatten(-1, (words, 32)).int() << _places(spikes)).sum(-1, dtype=torch.int32)


def unpack(words: Tensor, features: int) -> Tensor:
    """The bits as 0 and 1, (..., N) int32."""
    return ((words.unsqueeze(-1) >> _places(words)) & 1).flatten(-2)[..., :features]


def _places(like: Tensor) -> Tensor:
    return torch.arange(32, dtype=torch.int32, device=like.device)


def count(words: Tensor) -> Tensor:
    """How many bits are set, a 0-dim int64 tensor."""
    # pairs, then fours, then bytes of a word, which a product adds up in its highest byte
    x = words - ((words >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = ((x + (x >> 4)) & 0x0F0F0F0F) * 0x01010101
    return (x >> 24).sum()


def pack_events(indptr: Tensor, indices: Tensor, shape: Sequence[int]) -> Tensor:
    """Bits (T, B, ceil(N / 32)) of CSR events over rows b * T + t."""
    T, B, N = shape
    words = -(-N // 32)
    rows, columns = coordinates(indptr, indices)
    row = (rows % max(1, T)) * B + rows // max(1, T)
    out = torch.zeros(T * B * words, dtype=torch.int32, device=indices.device)
    bit = torch.ones_like(indices) << (indices % 32)
    return out.index_add_(0, row * words + columns // 32, bit).view(T, B, words)


def unpack_events(words: Tensor, features: int) -> tuple[Tensor, Tensor]:
    """Bits (T, B, ceil(N / 32)) as CSR events over rows b * T + t: int32 indptr and indices. Waits for a device."""
    spikes = unpack(words.transpose(0, 1).flatten(0, 1), features)
    columns = spikes.nonzero()[:, 1]
    if columns.numel() > MAX_EVENTS:
        raise InputError(f"more than {MAX_EVENTS} events in one train; split the batch.")
    indptr = torch.zeros(spikes.shape[0] + 1, dtype=torch.int32, device=words.device)
    indptr[1:] = spikes.sum(1).cumsum(0)
    return indptr, columns.to(torch.int32)
