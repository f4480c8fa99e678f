"""Memory whose numbers can change without a trace in a tensor's version: seen by numpy or C, or through ``.data``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import ref

import torch
from torch import Tensor

ALIASES = "_snn_sparse_aliases"
"""Attribute of storages that others write to without a trace in a tensor's version, as through ``.data``."""

PINNED = "_snn_sparse_pinned"
"""Attribute of storages that torch resizes no more because a thread of ours reads them."""


class _Watched:
    data = False
    optimizer_steps = 0


watched = _Watched()
"""``data``: whether :func:`note_alias` is called where Python takes ``.data``. ``optimizer_steps``: how many have begun
and ended in the process, as those that are fused change parameters without a version."""


class _Aliases:
    """Of a storage: how many there have been, and those that may still be there."""

    __slots__ = ("count", "held")

    def __init__(self) -> None:
        self.count, self.held = 0, list[Callable[[], Any]]()


def note_alias(x: Tensor, alias: Any = None) -> None:
    """``alias``, with a version of its own, is on the memory of ``x`` from now on; None: something outside torch is."""
    aliases = x.untyped_storage().__dict__.setdefault(ALIASES, _Aliases())
    aliases.count += 1
    aliases.held = [other for other in aliases.held if other() is not None]
    aliases.held.append((lambda: True) if alias is None else ref(alias))


def is_unseen(storage: Any) -> bool:
    """Whether something without a version of its tensors may write to this memory."""
    held = storage.__dict__
    if not storage.resizable() and PINNED not in held:  # numpy's, C's, another process's
        return True
    return ALIASES in held and any(alias() is not None for alias in held[ALIASES].held)


def _uses(storage: Any) -> int:
    # how many tensors there are on it, and this object
    return int(torch._C._storage_Use_Count(storage._cdata))  # type: ignore[attr-defined]


_sole = torch.empty(1)
_ALONE = _uses(_sole.untyped_storage()) if hasattr(torch._C, "_storage_Use_Count") else None


def is_seen_by_others(storage: Any) -> bool:
    """Whether more than one tensor is known to be on this memory."""
    return _ALONE is not None and _uses(storage) > _ALONE


def is_alone(x: Tensor) -> bool:
    """Whether no other tensor, and nothing outside torch, sees the memory of ``x``."""
    storage = x.untyped_storage()
    if _ALONE is None or _uses(storage) != _ALONE or is_unseen(storage):
        return False
    return storage.device.type != "cpu" or not storage.is_shared()


def moment_of(x: Tensor) -> tuple[int, ...] | None:
    """What is another after everything that torch and its optimizers note of a change of ``x`` in its memory; None
    where somebody else sees this memory.

    It does not tell what collectives, scripts and C++ write without a version.
    """
    if not watched.data or x.is_inference() or not is_alone(x):
        return None
    # what was taken as .data, and is gone, may have been written to
    aliases = x.untyped_storage().__dict__.get(ALIASES)
    return x._version, watched.optimizer_steps, 0 if aliases is None else aliases.count
