"""``reset`` of snnTorch's neurons, their note of who fired before the last step, where the steps ran fused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..core.by_identity import ByIdentity
from .base import runner

LEFT = "reset"

Reset = Tensor | Callable[[], Tensor]


class _Note:
    """What is known of a module's reset: of steps that may not have run yet, and of the last that have, where it would
    have to be made."""

    __slots__ = ("unmade", "waiting")

    def __init__(self) -> None:
        self.waiting: Reset | None = None
        self.unmade: Callable[[], Tensor] | None = None


class _Resets:
    """Notes that wait until all recorded steps have run, as until then the attributes of a module say what it is; and
    then until somebody asks, where they would have to be made."""

    def __init__(self) -> None:
        self._notes: ByIdentity[_Note] = ByIdentity()

    def note(self, module: nn.Module, reset: Reset | None) -> None:
        if reset is not None:
            note = self._notes.get(module)
            if note is None:
                note = self._notes[module] = _Note()
            note.waiting = reset

    def note_last(self, module: Any, fired: Callable[[], Tensor] | None, membrane: Tensor | None) -> None:
        """The reset of a step that began with these spikes, or with this membrane."""
        shape = module._buffers["mem"].shape
        if fired is not None:
            self.note(module, partial(_shaped, fired, shape))
            return
        with torch.no_grad():
            before = torch.zeros(shape, device=module.threshold.device) if membrane is None else membrane
            reset = (before - module.threshold > 0).float()
        self.note(module, _shaped(lambda: reset, shape))

    def leave(self, module: nn.Module) -> None:
        note = self._notes.get(module)
        if note is None or note.waiting is None:
            return
        found, note.waiting, held = note.waiting, None, module.__dict__
        held.pop(LEFT, None)
        if isinstance(found, Tensor):
            held[LEFT], note.unmade = found, None
        else:
            note.unmade = found

    def forget(self, module: nn.Module) -> None:
        vars(module).pop(LEFT, None)
        note = self._notes.get(module)
        if note is not None:
            note.unmade = None

    def made(self, module: nn.Module) -> Tensor | None:
        """What was left, if it had to be made."""
        note = self._notes.get(module)
        if note is None or note.unmade is None:
            return None
        found, note.unmade = note.unmade, None
        return found()


def _shaped(made: Callable[[], Tensor], shape: torch.Size) -> Tensor:
    reset = made()
    if reset.shape == shape:
        return reset
    # a tensor of its own: a step of events would keep them all
    return reset.view(shape) if shape.numel() == reset.numel() else reset.clone()


resets = _Resets()


class LastReset:
    """The attribute of a class by which ``reset`` is found while the module itself has none: while steps that would set
    it are recorded, and until it is made."""

    def __get__(self, module: Any | None, owner: type | None = None) -> Any:
        if module is None:
            return self
        runner().settle(module)
        reset = resets.made(module)
        if reset is not None:
            vars(module)[LEFT] = reset
        if LEFT not in vars(module):
            raise AttributeError(f"{type(module).__name__!r} object has no attribute {LEFT!r}")
        return vars(module)[LEFT]
