"""Code that takes tensors without torch's function protocol: C++ that asks a recorded step for its numbers."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..core.errors import FusionError
from .flush import flush, realize
from .record import Record
from .recorded import Filled, Recorded, answers

_DEVICE, _DETACH = torch.ops.prim.device.default, torch.ops.aten.detach.default


def dispatched(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operator that C++ calls on recorded steps, or its question for the device: their numbers are made now.

    Autograd has taken note of the call before it came here, without the places that the steps get in the graph only
    now. So the call is made again, from the top, unless it wants no gradient of them.
    """
    late = [x for x in tensors_in((args, kwargs)) if type(x) is Recorded]
    noted = late and any(x.requires_grad for x in tensors_in((args, kwargs)) if type(x) is not Recorded)
    if late:
        realize(late, func, apart)
    if func is _DEVICE:
        return args[0].own.device
    if func is not _DETACH and torch.is_grad_enabled() and any(x.requires_grad for x in late):
        if noted or func.is_view:
            raise FusionError(
                f"{func} was called in C++ on a recorded step, where its gradient cannot be followed. It is computed "
                f"now: the same call works from here on. To avoid this run what is recorded before, by "
                f"snn_sparse_plugin.fusion.flush.flush(), or switch time fusion off (fuse_time=False)."
            )
        with torch.overrides.enable_reentrant_dispatch():
            return func(*args, **kwargs)
    places: dict[int, Any] = {}
    plain = _replaced((args, kwargs), places, lambda x: x.own.detach())
    return _put_back(func(*plain[0], **plain[1]), places)


def on_plain(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A function that Python calls on steps that were computed while C++ held them."""
    places: dict[int, Any] = {}
    plain = _replaced((args, kwargs), places, Filled.plain)
    return _put_back(func(*plain[0], **plain[1]), places)


def apart(record: Record, reason: Any, *, stepped: bool = False) -> None:
    """:func:`flush` in a thread of its own: here C++ code may have switched off half of torch."""
    if record.entered():
        return
    errors: list[BaseException] = []
    device = record.nodes[0].device if record.nodes else torch.device("cpu")
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def work() -> None:
        try:
            with nullcontext() if stream is None else torch.cuda.stream(stream):
                flush(record, reason, stepped=stepped, apart=True)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=contextvars.copy_context().run, args=(work,))
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


def tensors_in(items: Any) -> Iterator[Tensor]:
    """All tensors within nested containers."""
    if isinstance(items, Tensor):
        yield items
    elif isinstance(items, tuple | list | set):
        for item in items:
            yield from tensors_in(item)
    elif isinstance(items, dict):
        for item in items.values():
            yield from tensors_in(item)


def _replaced(items: Any, places: dict[int, Any], make: Callable[[Filled], Tensor]) -> Any:
    """``items`` with what ``make`` makes of each :class:`Filled`; ``places`` notes which stands for which."""
    if type(items) is Filled:
        plain = make(items)
        places[id(plain)] = (items, plain)
        return plain
    if type(items) in (tuple, list):
        return type(items)(_replaced(item, places, make) for item in items)
    if type(items) is dict:
        return {name: _replaced(item, places, make) for name, item in items.items()}
    return items


def _put_back(out: Any, places: dict[int, Any]) -> Any:
    """What a function returns, where it returns an argument as it is."""
    if isinstance(out, Tensor) and id(out) in places:
        return places[id(out)][0]
    if type(out) in (tuple, list):
        return type(out)(_put_back(item, places) for item in out)
    return out


answers.operators, answers.on_filled = dispatched, on_plain
