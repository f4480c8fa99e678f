"""Where a call is made: in which gradient mode, and whether it may run later instead."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from ..core.precision import Autocast, any_autocast, autocast_now, under

if TYPE_CHECKING:
    from .record import Record
    from .recorded import Recorded


class _Here(threading.local):
    record: Record | None = None
    paused: int = 0

    def __init__(self) -> None:
        self.spare: dict[Any, list[Recorded]] = {}


here = _Here()

# looked up once: these are asked at every call
_transformed = torch._C._are_functorch_transforms_active
_function_modes = torch._C._len_torch_function_stack
_dispatch_modes = torch._C._len_torch_dispatch_stack
_tracing = torch._C._is_tracing
_saving_hooks = torch._C._autograd._top_saved_tensors_default_hooks
_inference, _grad = torch.is_inference_mode_enabled, torch.is_grad_enabled


def mode_to_record() -> int | None:
    """The gradient mode of a call here and now, as :func:`grad_mode`; None where it may not run later."""
    if (
        here.paused
        or _transformed()
        or _function_modes()
        or _dispatch_modes()
        or _tracing()
        or _saving_hooks(True) is not None
    ):
        return None
    if any_autocast():
        return None if autocast_now() is None else call_mode()
    return 2 if _inference() else _grad()


_autocasts: list[Autocast] = [()]  # those that were met, by their numbers


def call_mode() -> int:
    """0 without gradients, 1 with, 2 in inference mode; and four times the number of the autocast in force."""
    mode = 2 if _inference() else int(_grad())
    if any_autocast():
        autocast = autocast_now() or ()
        if autocast not in _autocasts:
            _autocasts.append(autocast)
        mode += 4 * _autocasts.index(autocast)
    return mode


def learns(mode: int) -> bool:
    """Whether gradients are noted in this mode."""
    return mode & 3 == 1


def casts(mode: int) -> bool:
    """Whether products have another dtype in this mode than their factors."""
    return mode > 3


def in_mode(mode: int) -> AbstractContextManager[Any]:
    """What :func:`call_mode` said, again in force."""
    now = call_mode()
    if mode == now:
        return nullcontext()
    return _in_grad_mode(mode & 3) if mode >> 2 == now >> 2 else _in_autocast(mode)


@contextmanager
def _in_autocast(mode: int) -> Iterator[None]:
    with under(_autocasts[mode >> 2]), _in_grad_mode(mode & 3):
        yield


def _in_grad_mode(mode: int) -> AbstractContextManager[Any]:
    return torch.inference_mode() if mode == 2 else _without_inference_mode(bool(mode))


def in_mode_of(made: Any) -> AbstractContextManager[Any]:
    """The mode in which to take a result apart that several read: some of them want a gradient of it, whoever comes
    first."""
    return _without_inference_mode(True) if made.requires_grad and not learns(call_mode()) else nullcontext()


@contextmanager
def _without_inference_mode(grad: bool) -> Iterator[None]:
    with torch.inference_mode(False), torch.set_grad_enabled(grad):
        yield


class paused:
    """Inside the block, this thread records nothing."""

    def __enter__(self) -> None:
        here.paused += 1

    def __exit__(self, *_: object) -> None:
        here.paused -= 1
