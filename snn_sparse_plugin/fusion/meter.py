"""What fused calls took and kept, and what the same steps would have taken upstream: measured while a meter is on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn


@dataclass
class Meter:
    """Totals over all fused calls of step loops; ``*_upstream`` is one upstream step, measured, times the steps.

    Times are of the forward, of neurons and the linear layers inside their calls; bytes are what autograd keeps.
    """

    calls: int = 0
    steps: int = 0
    timed: int = 0
    seconds: float = 0.0
    seconds_upstream: float = 0.0
    bytes: int = 0
    bytes_upstream: int = 0

    def __post_init__(self) -> None:
        self._known: WeakKeyDictionary[nn.Module, dict[Any, tuple[float, int]]] = WeakKeyDictionary()

    def add(
        self, module: nn.Module, steps: int, run: Callable[[], Any], one: Callable[[], Any], key: Any
    ) -> Any:
        """Run a fused call, and note it; ``one`` is a single step of upstream's."""
        result, seconds, kept = _measured(run)
        if result is None:
            return None
        self.calls += 1
        self.steps += steps
        known = self._known.setdefault(module, {})
        if key not in known:  # kernels are compiled or loaded in a first call: it is not timed
            _measured(one)
            known[key] = _measured(one)[1:]
        else:
            self.timed += 1
            self.seconds += seconds
            self.seconds_upstream += steps * known[key][0]
        self.bytes += kept
        self.bytes_upstream += steps * known[key][1]
        return result


def _measured(run: Callable[[], Any]) -> tuple[Any, float, int]:
    storages: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        if not isinstance(x, nn.Parameter):
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        start = perf_counter()
        result = run()
        seconds = perf_counter() - start
    return result, seconds, sum(storages.values())


current: Meter | None = None
"""The meter that is on, for the whole process."""
