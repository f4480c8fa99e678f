"""Which recorded tensors nobody has any more, and that they stand for later steps: making one takes longer."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any
from weakref import getweakrefcount

import torch
from torch import Tensor

from .context import here
from .recorded import Recorded

# C++ that asks for the device is about to take the numbers: it has to ask here
make = partial(Tensor._make_wrapper_subclass, dispatch_device=True)
references = sys.getrefcount


def held(given: list[Any], alone: int | None = None) -> list[Any]:
    """Those of the objects in a list of nodes that somebody else refers to as well; all, where that cannot be told."""
    alone = ALONE if alone is None else alone
    return [x for x in given if references(x) > alone]


def _count_alone() -> int:
    """What ``held`` counts for an object that only a list holds, as this interpreter counts."""
    kept = object()
    for alone in range(1, 8):
        if not held([object()], alone) and held([kept], alone):
            return alone
    return 0


def _counts_graphs() -> bool:
    """Whether references that C++ holds show among Python's (torch 2.10 and newer)."""
    x = torch.ones(1)
    before = references(x)
    kept = torch.ones(1, requires_grad=True) * x
    return kept.requires_grad and references(x) > before


_GIL = getattr(sys, "_is_gil_enabled", lambda: True)()
ALONE = _count_alone() if _GIL else 0
"""References to an object that only a list holds, as a loop over it counts them; without the GIL counts say less."""

REUSES = _GIL and sys.version_info < (3, 14) and _counts_graphs()
"""Whether tensors are used again. From Python 3.14 on a frame may look at an object without counting it."""
_NOWHERE: Any = None


# Recorded tensors of records that ran which nobody has: making one takes longer than recording a call. A thread keeps
# so many, of so many shapes, dtypes, devices and modes.
_SPARE_EACH, _SPARE_KINDS = 256, 64


def spare_of(*kind: Any) -> list[Recorded]:
    """The spare tensors of this thread of this shape, dtype, device and mode."""
    spare = here.spare
    if kind not in spare and len(spare) >= _SPARE_KINDS:
        spare.clear()
    return spare.setdefault(kind, [])


def put_by(given: list[Recorded], spare: list[Recorded]) -> None:
    """Keep those of the tensors for a node's result that nobody has."""
    for x in given:
        if len(spare) >= _SPARE_EACH:
            return
        if references(x) == ALONE and type(x) is Recorded and len(x.__dict__) == 1 and not getweakrefcount(x):
            x._value = _NOWHERE
            spare.append(x)
