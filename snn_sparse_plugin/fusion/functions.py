"""What happens when a function of torch is called on recorded steps: the first of these that applies.

========  =================================================  ===================================================
it is     which functions                                    why
========  =================================================  ===================================================
answered  shape, dtype, device, ``zeros_like``,              no number of the step is needed
          ``x == None``, a cast to the dtype it has
prepared  ``dropout``, ``x += y``, ``batch_norm``, other     a mask is drawn or an object exchanged at once, or
          casts, ``linear``, ``stack`` of steps              it depends on arguments; ``linear`` and ``stack``
                                                             have a shorter way into the record
recorded  all in the table of ``recordable.py``              once over all steps gives what each step gives
run       every other function                               it needs numbers: the record runs, then the function
========  =================================================  ===================================================

``_HANDLERS`` holds the first two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .calls import next_linear, record_call, record_linear, record_steps
from .context import mode_to_record
from .flush import realize
from .in_place import WRITES, renew, write
from .recordable import LINEAR, RECORDABLE, functions
from .recorded import Recorded, answers


def _template(x: Recorded) -> Tensor:
    node = x._value[0]
    return torch.empty((), dtype=_dtype(x), device=node.device).expand(node.shape)


def _dtype(x: Recorded) -> torch.dtype:
    node, _, slot = x._value
    return node.dtypes[slot]


def _size(x: Any, dim: int | None = None) -> Any:
    shape = x._value[0].shape
    return shape if dim is None else shape[dim]


_get: Any = Tensor  # its attributes as descriptors
_META: dict[Any, Callable[..., Any]] = {
    _get.shape.__get__: lambda x: x._value[0].shape,
    Tensor.size: _size,
    _get.dtype.__get__: _dtype,
    _get.device.__get__: lambda x: x._value[0].device,
    _get.layout.__get__: lambda x: torch.strided,
    _get.ndim.__get__: lambda x: len(x._value[0].shape),
    Tensor.dim: lambda x: len(x._value[0].shape),
    Tensor.numel: lambda x: x._value[0].shape.numel(),
    Tensor.nelement: lambda x: x._value[0].shape.numel(),
    Tensor.__len__: lambda x: x._value[0].shape[0],
    _get.is_sparse.__get__: lambda x: False,
    _get.is_cuda.__get__: lambda x: x._value[0].device.type == "cuda",
    Tensor.is_floating_point: lambda x: _dtype(x).is_floating_point,
    torch.is_floating_point: lambda x: _dtype(x).is_floating_point,
    Tensor.is_complex: lambda x: _dtype(x).is_complex,
    torch.is_complex: lambda x: _dtype(x).is_complex,
    torch.numel: lambda x: x._value[0].shape.numel(),
}
_LIKE = functions(
    "zeros_like ones_like empty_like full_like rand_like randn_like new_zeros new_ones new_empty new_full new_tensor"
)


def _answer(func: Any, args: Any, kwargs: Any) -> Any:
    x = args[0] if args else kwargs.get("input")
    if type(x) is not Recorded:
        return NotImplemented
    if func in _META:
        try:
            return _META[func](x, *args[1:], **kwargs)
        except (TypeError, IndexError):  # torch's own words
            return NotImplemented
    if func in _LIKE and not any(type(a) is Recorded for a in args[1:]):
        kwargs.pop("input", None)
        return func(_template(x), *args[1:], **kwargs)
    return NotImplemented


def _recorded(func: Any, args: Any, kwargs: Any) -> Any:
    found = record_call(func, args, kwargs)
    return NotImplemented if found is None else found


def _linear(func: Any, args: Any, kwargs: Any) -> Any:
    if not kwargs and len(args) == 3 and type(args[0]) is Recorded:
        x, weight, bias = args
        found = next_linear(x._value, weight, bias, mode_to_record())
        if found is None:
            found = record_linear(x, weight, bias)
        return NotImplemented if found is None else found
    return _recorded(func, args, kwargs)


def _stack(func: Any, args: Any, kwargs: Any) -> Any:
    """Successive steps of one result are not looked at one by one; any other stack is a call like others."""
    given = dict(zip(("tensors", "dim"), args, strict=False)) | kwargs
    steps, dim = given.pop("tensors", None), given.pop("dim", 0)
    if given or dim != 0 or type(steps) not in (list, tuple):
        return NotImplemented
    found = record_steps(steps)
    return NotImplemented if found is None else found


_EQ, _NE = functions("eq"), functions("ne")


def _compared_with_none(func: Any, args: Any, kwargs: Any) -> Any:
    if len(args) == 2 and args[1] is None:
        return NotImplemented if func not in _EQ | _NE else func in _NE
    return NotImplemented


def _cast(func: Any, args: Any, kwargs: Any) -> Any:
    """A conversion to the dtype that the tensor has returns it as it is."""
    x = args[0]
    if type(x) is Recorded and len(args) == 1 and not kwargs and _dtype(x) == _CASTS[func]:
        return x
    return _recorded(func, args, kwargs)


_CASTS = {
    Tensor.float: torch.float32,
    Tensor.double: torch.float64,
    Tensor.half: torch.float16,
    Tensor.bfloat16: torch.bfloat16,
    Tensor.long: torch.int64,
    Tensor.int: torch.int32,
    Tensor.bool: torch.bool,
}


def _to(func: Any, args: Any, kwargs: Any) -> Any:
    """``x.to(...)`` of a dtype, or of the device where the tensor is."""
    x = args[0]
    if type(x) is not Recorded or len(args) + len(kwargs) != 2:
        return NotImplemented
    node = x._value[0]
    wanted = args[1] if len(args) == 2 else kwargs.get("dtype", kwargs.get("device"))
    if isinstance(wanted, str | torch.device):
        device = torch.device(wanted)
        same = device.type == node.device.type and device.index in (None, node.device.index)
        return x if same and (device.type == "cpu" or device == node.device) else NotImplemented
    if isinstance(wanted, torch.dtype):
        return x if wanted == _dtype(x) else _recorded(Tensor.to, (x, wanted), {})
    return NotImplemented


def _dropout(func: Any, args: Any, kwargs: Any) -> Any:
    """The mask is drawn now, as upstream draws it, and multiplied later."""
    names = ("input", "p", "training", "inplace")
    given = {"p": 0.5, "training": True, "inplace": False, **dict(zip(names, args, strict=False)), **kwargs}
    x, p = given.get("input"), given["p"]
    if type(x) is not Recorded or given["inplace"] or not isinstance(p, int | float) or not 0 <= p < 1:
        return NotImplemented
    if not given["training"] or p == 0:
        return x
    if not _dtype(x).is_floating_point or mode_to_record() is None:
        return NotImplemented
    with torch.no_grad():
        ones = torch.ones(x._value[0].shape, dtype=_dtype(x), device=x._value[0].device)
        mask = torch.dropout(ones, p, True) if func is F.dropout else torch.feature_dropout(ones, p, True)
    # after the draw the call has to be recorded: a second draw would not be upstream's
    found = record_call(torch.mul, (x, mask), {})
    return x * mask if found is None else found


def _batch_norm(func: Any, args: Any, kwargs: Any) -> Any:
    names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    given = {"training": False, **dict(zip(names, args, strict=False)), **kwargs}
    if given["training"] or given.get("running_mean") is None:
        return NotImplemented  # statistics of each step
    return _recorded(func, args, kwargs)


_IN_PLACE = {
    getattr(Tensor, name): getattr(Tensor, plain)
    for plain in ("add", "sub", "mul", "div")
    for name in (f"{plain}_", f"__i{plain}__", "__itruediv__" if plain == "div" else f"__i{plain}__")
    if hasattr(Tensor, name)
}


def _in_place(func: Any, args: Any, kwargs: Any) -> Any:
    """``x += y``: the object stands for the new value from now on."""
    return renew(args[0], _IN_PLACE[func], args, kwargs)


def _out(func: Any, args: Any, kwargs: Any) -> Any:
    """``torch.maximum(best, x, out=best)``."""
    return renew(kwargs["out"], func, args, {name: x for name, x in kwargs.items() if name != "out"})


_HANDLERS: dict[Any, Callable[[Any, Any, Any], Any]] = {
    **dict.fromkeys([*_META, *_LIKE], _answer),
    **dict.fromkeys(_EQ | _NE, _compared_with_none),
    **dict.fromkeys(_CASTS, _cast),
    **dict.fromkeys(_IN_PLACE, _in_place),
    **dict.fromkeys(WRITES, write),
    Tensor.to: _to,
    F.dropout: _dropout,
    F.dropout2d: _dropout,
    F.batch_norm: _batch_norm,
    LINEAR: _linear,
    torch.stack: _stack,
}


def _without_running(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    handler = _HANDLERS.get(func)
    if handler is not None:
        found = handler(func, args, dict(kwargs))
        if found is not NotImplemented:
            return found
    if func not in RECORDABLE or kwargs.get("inplace"):
        return NotImplemented
    return _recorded(func, args, kwargs) if kwargs.get("out") is None else _out(func, args, kwargs)


def called(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Answer a call of ``func`` with recorded steps among its arguments."""
    try:
        found = _without_running(func, args, kwargs)
    except AttributeError:  # one that another thread, or a finalizer, has run just now
        if any(type(x) is Recorded for x in args):
            raise
        found = NotImplemented
    if found is not NotImplemented:
        return found

    realize((args, kwargs), func)
    return func(*args, **kwargs)


answers.functions = called
