"""The ordinary tensors that a record reads, which may change before it runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.errors import FusionError
from ..core.host import waits
from ..core.unseen import is_seen_by_others, is_unseen
from .arguments import Entry
from .description import version


class Plain:
    """What such tensors are when a step reads them.

    Where a version tells whether a tensor has changed, the tensor itself is noted. Where it does not, an input is
    copied, as upstream would have read it at once; parameters stay themselves and are compared in the end.
    """

    __slots__ = ("_before", "_copies", "_storages")

    def __init__(self) -> None:
        self._storages: set[int] = set()
        self._before: dict[int, tuple[Tensor, Tensor]] = {}  # parameters, with their numbers then
        self._copies: dict[Any, tuple[Tensor, Entry]] = {}  # the last copy from each piece of memory

    def entry(self, x: Tensor) -> Entry:
        """What is noted for ``x`` as an argument of a call."""
        storage = x.untyped_storage()
        self._storages.add(storage._cdata)
        if x.requires_grad and x.is_leaf:
            self.guard(x)
        elif is_unseen(storage) or x.is_inference():
            return self._copy(x)
        return x, version(x)

    def guard(self, x: Tensor) -> None:
        """``x`` has to stay what it is until the record runs."""
        storage = x.untyped_storage()
        self._storages.add(storage._cdata)
        unseen = is_unseen(storage) or x.is_inference()
        if (unseen or is_seen_by_others(storage)) and id(x) not in self._before:
            self._before[id(x)] = x, _bits(x).clone()

    def reads(self, x: Tensor) -> bool:
        """Whether memory of this tensor is among what the record reads."""
        return x.layout is torch.strided and x.untyped_storage()._cdata in self._storages

    def check(self) -> None:
        """Raise :class:`FusionError` if a guarded tensor has other numbers now."""
        for x, before in self._before.values():
            if x.shape != before.shape[: x.dim()] or not torch.equal(_bits(x), before):
                raise FusionError(
                    f"a parameter or buffer of shape {tuple(x.shape)} was changed after a step that reads it was "
                    f"recorded, before the step's result was used, through memory that it shares with numpy or with "
                    f"another tensor. Use the result first (snn_sparse_plugin.fusion.flush.flush() runs what is "
                    f"recorded), or switch time fusion off (fuse_time=False, or SNN_SPARSE_FUSE=0)."
                )

    def clear(self) -> None:
        for held in (self._storages, self._before, self._copies):
            held.clear()  # type: ignore[attr-defined]

    def _copy(self, x: Tensor) -> Entry:
        if x.requires_grad:
            copy = x.clone()
            return copy, version(copy)
        key = (x.data_ptr(), x.shape, x.stride(), x.dtype)
        found = self._copies.get(key)
        # a frame that is still the same stays one tensor, which is multiplied once; a device would have to be asked
        if found is None or waits(x) or not torch.equal(_bits(found[0]), _bits(x)):
            copy = x.detach().clone()
            found = self._copies[key] = copy, (copy, version(copy))
        return found[1]


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(x: Tensor) -> Tensor:
    """The tensor as integers, by which NaN equals NaN."""
    x = torch.view_as_real(x.detach()) if x.is_complex() else x.detach()
    return x.view(_INTEGERS[x.element_size()])
