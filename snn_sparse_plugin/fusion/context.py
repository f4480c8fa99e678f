"""Where a call is made: in which gradient mode, and whether it may run later instead."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

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
_autocast = torch._C._is_any_autocast_enabled
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
        or _autocast()
        or _tracing()
        or _saving_hooks(True) is not None
    ):
        return None
    return 2 if _inference() else _grad()


def grad_mode() -> int:
    """0 without gradients, 1 with, 2 in inference mode."""
    return 2 if _inference() else int(_grad())


def in_mode(mode: int) -> AbstractContextManager[Any]:
    """What :func:`grad_mode` said, again in force."""
    if mode == grad_mode():
        return nullcontext()
    return torch.inference_mode() if mode == 2 else _without_inference_mode(bool(mode))


@contextmanager
def _without_inference_mode(grad: bool) -> Iterator[None]:
    with torch.inference_mode(False), torch.set_grad_enabled(grad):
        yield


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Products in the precision of their factors."""
    return torch.autocast(device.type, enabled=False) if _autocast() else nullcontext()


class paused:
    """Inside the block, this thread records nothing."""

    def __enter__(self) -> None:
        here.paused += 1

    def __exit__(self, *_: object) -> None:
        here.paused -= 1
