"""Where recorded steps may wait no longer: what takes numbers, or changes them, without torch's function protocol."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch import eager_transforms
from torch.autograd import Function, forward_ad
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ..adapters import active, cut
from ..adapters.active import here as firing
from ..core import registry
from ..core.surrogates import plain_apply
from ..core.unseen import note_alias, watched
from . import functions as _functions  # noqa: F401, answers calls on recorded steps
from .context import here
from .flush import flush, realize
from .native import apart
from .places import check_place, checked
from .recorded import Filled, Recorded

_installed = False
_lock = threading.RLock()


def install() -> None:
    """Once for the process. Where nothing is recorded, each of these does what torch's own does."""
    global _installed
    with _lock:
        if _installed:
            return
        _installed = True
        apply = Function.__dict__["apply"]  # Python's classmethod, or from torch 2.14 on one of C++
        Function.apply = classmethod(_on_numbers(getattr(apply, "__func__", apply)))  # type: ignore[assignment, method-assign]
        for script in (torch._C.ScriptFunction, torch._C.ScriptMethod):
            script.__call__ = _on_real(script.__call__)  # type: ignore[method-assign]
        Tensor.as_subclass = _on_real(Tensor.as_subclass)  # type: ignore[assignment, method-assign]
        torch.asarray = _on_real(torch.asarray)  # type: ignore[assignment]
        for name in ("_to_dlpack", "_to_dlpack_versioned"):
            if hasattr(torch._C, name):
                _replace(name, _giving_away(getattr(torch._C, name)), torch._C, torch, torch.utils.dlpack)
        _replace("_swap_tensor_impl", _before(flush, torch._C._swap_tensor_impl), torch._C)  # type: ignore[attr-defined]
        for method in ("numpy", "set_"):
            setattr(Tensor, method, _giving_away(getattr(Tensor, method)))
        for method, what in (("retain_grad", "the gradient"), ("register_hook", "a hook on the gradient")):
            setattr(Tensor, method, checked(what, getattr(Tensor, method)))
        graph = torch.autograd.graph
        graph.get_gradient_edge = checked("the gradient edge", graph.get_gradient_edge)
        torch.autograd._engine_run_backward = _to_inputs(torch.autograd._engine_run_backward)  # type: ignore[attr-defined]
        Tensor.data = _data  # type: ignore[assignment, misc]
        watched.data = True
        for home, name in ((forward_ad, "make_dual"), (eager_transforms, "_jvp_with_argnums")):
            if hasattr(home, name):  # forward derivatives look at the memory of what they wrap
                setattr(home, name, _on_real(getattr(home, name)))
        register_optimizer_step_pre_hook(_step_begins)
        register_optimizer_step_post_hook(_step_ends)


def _step_begins(*_: Any) -> None:
    watched.optimizer_steps += 1  # here, too, as one that fails does not end
    flush(reason="optimizer.step()")


def _step_ends(*_: Any) -> None:
    watched.optimizer_steps += 1


def _on_numbers(upstream: Callable[..., Any]) -> Callable[..., Any]:
    # C++ takes the arguments apart before any function protocol is asked, and outputs of a custom forward that are
    # not there yet could not become part of the graph
    @wraps(upstream)
    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if (active.idle and Recorded not in map(type, args)) or torch.compiler.is_compiling():
            return upstream(cls, *args, **kwargs)
        if here.record is not None:
            realize((args, kwargs), cls.__name__)
        direct = _of_a_threshold(cls)
        if direct is not None:
            if firing.whole is not None and not kwargs:
                return direct(*args)
            known = firing.cut
            if known is None or known.applies is not cls:
                return upstream(cls, *args, **kwargs)
            return cut.spike(known, lambda x: upstream(cls, x, *args[1:], **kwargs), args[0])
        here.paused += 1  # paused, written out
        try:
            return upstream(cls, *args, **kwargs)
        finally:
            here.paused -= 1

    return apply


@lru_cache(maxsize=256)
def _of_a_threshold(cls: type[Function]) -> Callable[..., Any] | None:
    """The short way into a function that every step of a neuron calls, in which no neuron can run; None for others."""
    # of all adapters, hooked or not: it is asked once
    known = any(cls.__module__ in adapter.functions for adapter in registry.load_all("adapters").values())
    return plain_apply(cls) if known else None


def _on_real(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """A function of C++, on steps that have been computed."""

    @wraps(upstream)
    def call(*args: Any, **kwargs: Any) -> Any:
        if here.record is not None and not torch.compiler.is_compiling():
            inside = torch._C._are_functorch_transforms_active()
            realize((args, kwargs), upstream.__name__, apart if inside else flush)
        return upstream(*args, **kwargs)

    return call


def _giving_away(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """A function that lets others write to the memory of its tensors: nothing that reads it may wait."""

    @wraps(upstream)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            realize((args, kwargs), upstream.__name__)
            for x in args:
                if _is_ordinary(x):
                    leave(x, upstream.__name__)
                    note_alias(x)
        return upstream(*args, **kwargs)

    return call


def _to_inputs(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """The engine behind ``backward`` and ``grad``, whose ``inputs`` are what gradients are asked at."""

    @wraps(upstream)
    def run(outputs: Any, *args: Any, **kwargs: Any) -> Any:
        if len(args) > 3 and args[3]:
            check_place("the gradient", args[3])
        return upstream(outputs, *args, **kwargs)

    return run


def _before(first: Callable[[], Any], upstream: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(upstream)
    def call(*args: Any) -> Any:
        first()
        return upstream(*args)

    return call


def _replace(name: str, ours: Callable[..., Any], *homes: Any) -> None:
    """A function of C++ under all its names."""
    upstream = getattr(homes[0], name)
    for home in homes:
        for known, value in list(vars(home).items()):
            if value is upstream:
                setattr(home, known, ours)


def _is_ordinary(x: Any) -> bool:
    return (type(x) is Tensor or type(x) is nn.Parameter) and x.layout is torch.strided


def leave(x: Tensor, reason: Any) -> None:
    """Run the record of this thread if it reads memory of this tensor."""
    record = here.record
    if record is not None and record.plain.reads(x):
        flush(record, reason)


_upstream_data: Any = torch._C.TensorBase.data  # type: ignore[attr-defined]


def _get_data(x: Tensor) -> Any:
    if torch.compiler.is_compiling() or not _is_ordinary(x):
        return _upstream_data.__get__(x)
    leave(x, ".data")
    alias = _upstream_data.__get__(x)
    note_alias(x, alias)
    return alias


def _set_data(x: Tensor, value: Any) -> None:
    if not torch.compiler.is_compiling():
        flush(reason=".data")
        realize((x, value), ".data")
        if type(value) is Filled:
            value = value.plain()
    _upstream_data.__set__(x, value)


_data = property(_get_data, _set_data, doc=_upstream_data.__doc__)
