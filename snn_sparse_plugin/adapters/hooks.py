"""Hooks on upstream's methods, and how to tell upstream's own from anyone else's."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Mapping
from operator import is_
from types import MappingProxyType, ModuleType
from typing import Any

from torch import nn

lock = threading.RLock()
"""Held while something of an upstream library is replaced."""


_hooks: set[Any] = set()  # a mark on the function would pass to whatever is made of it with functools.wraps


def is_hook(function: Any) -> bool:
    """Whether this very function is one that :func:`hook` has put in place."""
    return getattr(function, "__hash__", None) is not None and function in _hooks


def as_hook(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, which :func:`is_hook` knows from now on."""
    _hooks.add(function)
    return function


def hook(cls: type, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace a method of an upstream class by ``wrap(method)``, unless a hook of ours runs in it already."""
    with lock:
        upstream = vars(cls).get(name)  # None: inherited, since a patch of this class has ended
        if upstream is not None and not is_hook(upstream):
            setattr(cls, name, as_hook(functools.wraps(upstream)(wrap(upstream))))


_get: Any = MappingProxyType.get


class Placed:
    """Attributes of upstream's classes as adapters have left them."""

    def __init__(self) -> None:
        self._as_left: dict[tuple[type, str], Any] = {}
        self._where: tuple[list[Mapping[str, Any]], list[str]] = [], []

    def note(self, cls: type, *names: str) -> None:
        for name in names:
            self._as_left[cls, name] = vars(cls).get(name)
        self._where = [vars(cls) for cls, _ in self._as_left], [name for _, name in self._as_left]

    def hold(self) -> bool:
        """Whether nobody has changed one since: asked whenever sparse mode is entered, so that C++ goes through."""
        now = map(_get, *self._where)
        return bool(self._as_left) and all(map(is_, now, self._as_left.values()))


placed = Placed()
"""Those of all adapters that are ``noted``: in one place, as asking twice takes longer than asking for more."""


def patched(cls: type, method: str, package: ModuleType) -> str | None:
    """Why a method of an upstream class is not upstream's own: someone else has replaced it. None if it is."""
    return _patched(getattr(cls, method, None), method, package)


def is_from(function: Any, package: ModuleType) -> bool:
    """Whether a function of Python is written in this package."""
    code = getattr(function, "__code__", None)
    return code is not None and code.co_filename.startswith(os.path.dirname(str(package.__file__)))


@functools.lru_cache(maxsize=1024)
def _patched(function: Any, name: str, package: ModuleType) -> str | None:
    while is_hook(function):
        function = function.__wrapped__
    code = getattr(function, "__code__", None)
    if code is None or is_from(function, package):
        return None
    return f"its {name}() was patched by {function.__globals__.get('__name__', code.co_filename)}"


_every = nn.modules.module
_forward, _before = _every._global_forward_hooks, _every._global_forward_pre_hooks
_backward, _before_backward = _every._global_backward_hooks, _every._global_backward_pre_hooks


def has_hooks(module: nn.Module) -> Any:
    """Whether calling the module runs hooks, which a fused path would skip."""
    held = module.__dict__  # asked at every call, and modules are slow to look names up
    return (
        held["_forward_hooks"]
        or held["_forward_pre_hooks"]
        or held["_backward_hooks"]
        or held["_backward_pre_hooks"]
        or _forward
        or _before
        or _backward
        or _before_backward
    )
