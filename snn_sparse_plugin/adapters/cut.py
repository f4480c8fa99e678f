"""A masked step that was decided before: its window and its surrogate are kept for as long as nothing they depend on
changes, and upstream's own ``fire`` runs on the module itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any

from torch import Tensor, nn

from ..core import tally
from ..core.by_identity import ByIdentity
from ..core.config import SparseConfig
from ..core.surrogates import Surrogate, apply_masked
from .counting import record_of
from .snntorch_surrogates import depends_on, is_made_by_factory


@dataclass(slots=True)
class Cut:
    """What is known of a neuron whose steps are masked."""

    config: SparseConfig
    function: FunctionType  # its spike_grad
    code: Any
    cells: tuple[tuple[Any, Any], ...]  # of its closure, with what is in them
    applies: type  # the autograd Function behind it, and that one's derivative
    derivative: Any
    surrogate: Surrogate
    threshold: float
    record: tally.Record

    def holds(self, module: nn.Module) -> bool:
        """Whether all this is still so; the options are looked at by the caller."""
        function = self.function
        if module.__dict__.get("spike_grad") is not function or function.__code__ is not self.code:
            return False
        for cell, value in self.cells:
            if cell.cell_contents is not value:
                return False
        return self.applies.__dict__.get("backward") is self.derivative


_kept: ByIdentity[Cut] = ByIdentity()
look = _kept.look


def keep(
    module: nn.Module, config: SparseConfig, function: Any, surrogate: Surrogate, threshold: float
) -> None:
    """Remember what was decided of a neuron, if it can be told whether that is still so."""
    if not is_made_by_factory(function):
        return
    *values, applies, derivative = depends_on(function)
    if applies is not None and not any(isinstance(value, Tensor) for value in values):
        cells = tuple(zip(function.__closure__ or (), values, strict=True))
        looked_at = config, function, function.__code__, cells, applies, derivative
        _kept[module] = Cut(*looked_at, surrogate, threshold, record_of(module))


def spike(cut: Cut, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """What ``function``, upstream's, makes of a membrane in ``fire``, while ``here.cut`` says what is known."""
    if not x.requires_grad:
        cut.record.count("no_grad")
        return function(x)
    return apply_masked(x, function, cut.surrogate, cut.threshold, cut.config.min_active, False, cut.record)
