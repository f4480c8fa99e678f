"""Ordinary tensors that recorded steps are added to or written into: ``total += spikes``, ``every[k] = spikes``.

Such a tensor is borrowed: its object stands for the result from then on, as a recorded step does, and its memory is
written when the record runs. Only a tensor whose memory nobody else sees can be borrowed; with any other the record
runs first, and the call is torch's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from numpy import broadcast_shapes
from torch import Tensor

from ..core.unseen import is_alone
from .calls import Call, place_of, record_call
from .context import here, mode_to_record
from .flush import flush
from .nodes import Borrowed, FunctionNode, WriteNode
from .recordable import filled, functions
from .recorded import Recorded, Value, give_back, swapped_out
from .written import place_in

WRITES = {Tensor.__setitem__} | functions("copy_ index_copy_ index_add_ index_put_")
"""What writes its arguments into a tensor."""


def renew(x: Any, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Let ``x`` stand for ``func(*args)``, of which it may be one of the arguments; NotImplemented where it cannot.

    Earlier calls keep what it was.
    """
    if type(x) is Recorded:
        node, _, slot = x._value
        if x._value in node.record.viewed or _is_view(x._value):
            return NotImplemented
        found = record_call(func, args, kwargs)
        if found is None or not _fits(x, found):
            return NotImplemented
        node.given[slot][:] = [other for other in node.given[slot] if other is not x]
        borrowed = x.__dict__.get("_borrowed")
        if borrowed is not None:
            borrowed.changes += 1
    else:
        home = _borrow(x)
        if home is None:
            return NotImplemented
        found = record_call(func, tuple(home if arg is x else arg for arg in args), kwargs)
        if found is None or not _fits(home, found):
            give_back(x, home)
            return NotImplemented
        x._borrowed = Borrowed(home)
    made = found._value[0]
    x._value = found._value
    made.given[0][-1] = x
    return x


def write(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Note a call that writes into its first argument; NotImplemented where it cannot wait."""
    x, *rest = args
    record, mode = here.record, mode_to_record()
    if record is None or mode is None or kwargs:
        return NotImplemented
    call = Call(func, record)
    try:
        form = call.scan(tuple(rest))
    except TypeError:
        return NotImplemented
    if place_of(call.entries)[0] is not record:
        return NotImplemented
    node: Any = x._value[0] if type(x) is Recorded else None
    if node is not None and not (
        type(node) is WriteNode
        and node.record is record
        and node.mode == mode
        and len(node.arguments) == len(call.entries)
    ):
        return NotImplemented
    if not _is_fine(func, x, form, call):
        return NotImplemented
    if node is None:
        home = _borrow(x)
        if home is None:
            return NotImplemented
        node = WriteNode(record, home, len(call.entries))
        x._borrowed = Borrowed(home)
        node.given[0].append(x)
    if not record.enter():
        return NotImplemented
    try:
        for argument, entry in zip(node.arguments, call.entries, strict=True):
            argument.append(entry)
        node.forms.append((func, form))
        record.count(node)
        x._value = (node, len(node) - 1, 0)
        x._borrowed.changes = len(node)
    finally:
        record.leave()
    if record.calls > record.look and record.is_full():
        flush(record, "a large record")
    return x


def _borrow(x: Any) -> Tensor | None:
    """The tensor ``x``, whose object is a recorded one from now on; None where somebody else may see its memory."""
    record = here.record
    if record is None or type(x) is not Tensor or x.layout is not torch.strided or x.is_inference():
        return None
    if (x.requires_grad and x.is_leaf) or not is_alone(x):
        return None
    home = swapped_out(x)
    if home is not None and record.plain.reads(home):  # by this object, as nothing else is on its memory
        for node in record.nodes:
            node.replace(x, home)
    return home


def _fits(x: Tensor, made: Recorded) -> bool:
    return (x.shape, x.dtype) == (made.shape, made.dtype)


def _is_view(value: Value) -> bool:
    return isinstance(value[0], FunctionNode) and value[0].view


def _is_fine(func: Any, x: Tensor, form: Any, call: Call) -> bool:
    """Whether torch takes the call, as seen on other tensors of these forms; if not, it says why in the user's line."""
    if func is not Tensor.__setitem__:
        key = (x.shape, x.dtype, *call.shapes)
        if key not in _fine:
            if len(_fine) > 4096:
                _fine.clear()
            # torch would ask its compiler of tensors without data, which takes a third of a second to import
            _fine[key] = (
                x.numel() <= _COPIED and _takes(func, x, form, call.of_one_number(), "cpu")
            ) or _takes(func, x, form, call.without_data(), "meta")
        return _fine[key]
    at = place_in(form, x.dim())
    if at is None:
        return _takes(func, x, form, call.without_data(), "meta")
    shape = (*x.shape[: at[0]], *x.shape[at[0] + 1 :])
    if not -x.shape[at[0]] <= at[1] < x.shape[at[0]] or len(call.entries) != 1:
        return False
    given = call.tensors[0][0]
    try:
        return len(given) <= len(shape) and broadcast_shapes(given, shape) == shape
    except ValueError:
        return False


_COPIED = 1 << 20
"""Numbers up to which a tensor is tried with memory."""

_fine: dict[Any, bool] = {}


def _takes(func: Any, x: Tensor, form: Any, others: list[Tensor], device: str) -> bool:
    try:
        with torch.no_grad():
            func(torch.zeros(x.shape, dtype=x.dtype, device=device), *filled(form, others))
    except Exception:
        return False
    return True
