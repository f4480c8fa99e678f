"""Half precision: what neurons compute in, and torch's autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)

_KINDS = ("cpu", "cuda")

any_autocast = torch._C._is_any_autocast_enabled


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """What neurons compute in, for an input of this dtype: sums over steps are not made in half precision."""
    return torch.float32 if dtype in HALF else dtype


def cast(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """``x`` in this dtype; None stays None."""
    return x if x is None or x.dtype == dtype else x.to(dtype)


def without_autocast() -> AbstractContextManager[Any]:
    """Products in the precision of their factors."""
    if not any_autocast():
        return nullcontext()
    stack = ExitStack()
    for kind in _KINDS:
        stack.enter_context(torch.autocast(kind, enabled=False))
    return stack


Autocast = tuple[tuple[str, torch.dtype], ...]
"""The devices whose autocast is on, each with the dtype of products; with None for one that is not known here."""


def autocast_now() -> Autocast | None:
    """The autocast in force; empty where there is none, None where it is that of another device."""
    if not any_autocast():
        return ()
    found = tuple((k, torch.get_autocast_dtype(k)) for k in _KINDS if torch.is_autocast_enabled(k))
    return found or None


def under(autocast: Autocast) -> AbstractContextManager[Any]:
    """This autocast, and no other, in force."""
    stack = ExitStack()
    wanted = dict(autocast)
    for kind in _KINDS:
        if kind in wanted:
            stack.enter_context(torch.autocast(kind, wanted[kind]))
        elif torch.is_autocast_enabled(kind):
            stack.enter_context(torch.autocast(kind, enabled=False))
    return stack
