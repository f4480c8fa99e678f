"""Norse's threshold functions: which surrogate each method is, and the autograd Functions behind them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from ..surrogates import Surrogate

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
        value = float(alpha)
        if method == "super":
            return Surrogate("fast_sigmoid", (value if _super_uses_alpha() else 1.0,))
        if method in METHODS:
            return Surrogate(METHODS[method], (value,))
    except (TypeError, ValueError, RuntimeError, ConfigError):  # e.g. one alpha per neuron
        return f"alpha={alpha} of threshold method {method!r}"
    return f"threshold method {method!r}"


@cache
def _super_uses_alpha() -> bool:
    """Norse 1.1.0 ignores alpha, later versions do not: look at the gradient instead of the version."""
    with torch.enable_grad():
        x = torch.tensor(0.5, requires_grad=True)
        function = import_module("norse.torch.functional.superspike").SuperSpike
        upstream = upstream_apply.get(function, function.apply)
        (grad,) = torch.autograd.grad(upstream(x, torch.tensor(100.0)), x)
    return bool(grad < 0.1)  # 1 / 1.5 ** 2 = 0.44 without alpha, 1 / 51 ** 2 with it


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
