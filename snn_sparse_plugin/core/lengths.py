"""Samples of different lengths in one batch: how many of the T steps are each sample's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .errors import InputError


def read_lengths(lengths: Any, T: int, B: int) -> Tensor:
    """Numbers of steps as int64 (B,) on the CPU; a tensor on a GPU is waited for.

    Raises:
        InputError: not one whole number for each sample, or numbers outside 0…T.

    Example:
        >>> read_lengths([3, 0], T=5, B=2)
        tensor([3, 0])
    """
    try:
        found = torch.as_tensor(lengths).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"lengths are B = {B} whole numbers, got {type(lengths).__name__}.") from error
    if not found.numel() and not B:
        return torch.zeros(0, dtype=torch.int64)
    if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        raise InputError(f"lengths are numbers of steps, whole numbers, got {found.dtype}.")
    if found.shape != (B,):
        raise InputError(f"lengths has shape {tuple(found.shape)}, expected ({B},): one for each sample.")
    found = found.long()
    wrong = ((found < 0) | (found > T)).nonzero()
    if len(wrong):
        sample = int(wrong[0])
        raise InputError(f"lengths lie in 0…T = {T}, got {int(found[sample])} for sample {sample}.")
    return found
