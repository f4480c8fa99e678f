"""Norse's threshold functions: which surrogate each method is, and the autograd Functions behind them."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable
from functools import cache, lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..core.errors import ConfigError
from ..core.host import number
from ..core.surrogates import Surrogate

upstream_apply: dict[Any, Callable[..., Tensor]] = {}
"""Upstream's own ``Function.apply`` of what the adapter has hooked."""

# Norse's method -> our kind; "super" is the default of every neuron
METHODS = {"triangle": "triangle", "tanh": "tanh", "circ": "circ", "heavi_erfc": "erfc"}


def surrogate_of(method: str, alpha: Any) -> Surrogate | str:
    """The surrogate of Norse's ``threshold(x, method, alpha)``, or why there is none.

    Example:
        >>> surrogate_of("tanh", 2.0)
        tanh(alpha=2)
    """
    if method == "heaviside":
        return Surrogate("zero")
    try:
        value = number(alpha)
        if method == "super":
            return _made("fast_sigmoid", value if _super_uses_alpha() else 1.0)
        if method in METHODS:
            return _made(METHODS[method], value)
    except (TypeError, ValueError, RuntimeError, ConfigError):  # e.g. one alpha per neuron
        return f"alpha={alpha} of threshold method {method!r}"
    return f"threshold method {method!r}"


@lru_cache(maxsize=256)
def _made(kind: str, alpha: float) -> Surrogate:
    return Surrogate(kind, (alpha,))


@cache
def _super_uses_alpha() -> bool:
    """Norse 1.1.0 ignores alpha, later versions do not: look at the gradient instead of the version."""
    with torch.enable_grad():
        x = torch.tensor(0.5, requires_grad=True)
        function = import_module("norse.torch.functional.superspike").SuperSpike
        upstream = upstream_apply.get(function, function.apply)
        (grad,) = torch.autograd.grad(upstream(x, torch.tensor(100.0)), x)
    return bool(grad < 0.1)  # 1 / 1.5 ** 2 = 0.44 without alpha, 1 / 51 ** 2 with it


def replaced() -> str | None:
    """Which of Norse's threshold functions, or of their derivatives, somebody has put another one for; None if none."""
    folder = os.path.dirname(str(import_module("norse").__file__))
    named = [(f"{m.__name__}.threshold", m.threshold) for m in _with_threshold()]
    named += [(f"{cls.__name__}.backward", cls.backward) for cls in threshold_functions()]
    for name, function in named:
        code = getattr(function, "__code__", None)
        if code is None or not code.co_filename.startswith(folder):
            return f"{name} is not Norse's own"
    return None


@cache
def _with_threshold() -> list[Any]:
    """Norse imports ``threshold`` by name into each of these modules."""
    known = [m for name, m in list(sys.modules.items()) if name.startswith("norse.torch.functional.")]
    return [m for m in known if inspect.isfunction(getattr(m, "threshold", None))]


@cache
def threshold_functions() -> dict[Any, str]:
    """The autograd Functions behind ``threshold``, and the method each serves."""
    known = import_module("norse.torch.functional.threshold")
    return {
        import_module("norse.torch.functional.superspike").SuperSpike: "super",
        known.Triangle: "triangle",
        known.HeaviTanh: "tanh",
        known.HeaviCirc: "circ",
        known.HeaviErfc: "heavi_erfc",
    }
