"""``reset`` of snnTorch's neurons, their note of who fired before the last step, where the steps ran fused."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .base import runner

LEFT = "reset"


class _Resets:
    """Notes that wait until all recorded steps have run: until then the attributes of a module say what it is."""

    def __init__(self) -> None:
        self._waiting: WeakKeyDictionary[nn.Module, Tensor] = WeakKeyDictionary()

    def note(self, module: nn.Module, reset: Tensor | None) -> None:
        if reset is not None:
            self._waiting[module] = reset

    def note_last(self, module: Any, fired: Tensor | None, membrane: Tensor | None) -> None:
        """The reset of a step that began with these spikes, or with this membrane."""
        shape = module._buffers["mem"].shape
        reset = fired
        if reset is None:
            with torch.no_grad():
                before = torch.zeros(shape, device=module.threshold.device) if membrane is None else membrane
                reset = (before - module.threshold > 0).float()
        if reset.shape != shape:
            # a tensor of its own: a step of events would keep them all
            reset = reset.view(shape) if shape.numel() == reset.numel() else reset.clone()
        self.note(module, reset)

    def leave(self, module: nn.Module) -> None:
        found = self._waiting.pop(module, None)
        if found is not None:
            vars(module)[LEFT] = found


resets = _Resets()


class LastReset:
    """The attribute of a class by which ``reset`` is found while steps that would set it are recorded."""

    def __get__(self, module: Any | None, owner: type | None = None) -> Any:
        if module is None:
            return self
        runner().settle(module)
        if LEFT not in vars(module):
            raise AttributeError(f"{type(module).__name__!r} object has no attribute {LEFT!r}")
        return vars(module)[LEFT]
