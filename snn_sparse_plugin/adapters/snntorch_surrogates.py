"""snnTorch's spike functions: closures, recognised by the code of the factories that made them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..surrogates import Surrogate

SpikeFunction = Callable[[Tensor], Tensor]

# upstream's factory -> (our kind, the factory's parameters in the order of ours)
_FACTORIES = {
    "atan": ("atan", ("alpha",)),
    "fast_sigmoid": ("fast_sigmoid", ("slope",)),
    "sigmoid": ("sigmoid", ("slope",)),
    "straight_through_estimator": ("straight_through", ()),
    "triangular": ("triangular", ("threshold",)),
    "heaviside": ("heaviside", ()),
    "spike_rate_escape": ("spike_rate_escape", ("beta", "slope")),
    "SFS": ("sparse_fast_sigmoid", ("slope", "B")),
}

_recognised: WeakKeyDictionary[Any, Surrogate] = WeakKeyDictionary()


def recognise(function: SpikeFunction) -> Surrogate:
    """The surrogate behind a ``spike_grad``, by the code and closure of snnTorch's factories.

    Anything unknown becomes ``Surrogate("custom")``, which evaluates the function's own gradient.

    Example:
        >>> from snntorch import surrogate
        >>> recognise(surrogate.fast_sigmoid(slope=100))
        fast_sigmoid(slope=100)
    """
    if isinstance(function, Surrogate):
        return function
    try:
        return _recognised[function]
    except (KeyError, TypeError):
        pass
    found = _by_code(function)
    if found is None:
        return _by_class(function) or Surrogate("custom", function=function)
    if not any(isinstance(c.cell_contents, Tensor) for c in function.__closure__ or ()):
        _recognised[function] = found
    return found


def _by_code(function: Any) -> Surrogate | None:
    code: Any = getattr(function, "__code__", None)
    snn = import_module("snntorch")
    if code in (c._surrogate_bypass.__code__ for c in (snn.SpikingNeuron, snn.LeakyParallel)):
        return Surrogate("zero")
    if code not in _codes():
        return None
    kind, names = _codes()[code]
    closure = dict(zip(code.co_freevars, (c.cell_contents for c in function.__closure__ or ()), strict=True))
    return _surrogate(kind, *(closure[name] for name in names))


def _by_class(function: SpikeFunction) -> Surrogate | None:
    # `Heaviside.apply`, or LeakyParallel's private ATan.apply with its default parameter
    cls = getattr(function, "__self__", None)
    if getattr(function, "__name__", "") != "apply" or not isinstance(cls, type):
        return None
    known = import_module("snntorch.surrogate")
    if cls is known.Heaviside:
        return Surrogate("heaviside")
    if cls is known.StraightThroughEstimator:
        return Surrogate("straight_through")
    if cls is import_module("snntorch").LeakyParallel.ATan:
        return _surrogate("atan", inspect.signature(cls.forward).parameters["alpha"].default)
    return None


def _surrogate(kind: str, *params: Any) -> Surrogate | None:
    try:
        return Surrogate(kind, tuple(float(p) for p in params))
    except (TypeError, ValueError, RuntimeError, ConfigError):  # e.g. one slope per neuron
        return None


@cache
def _codes() -> dict[Any, tuple[str, tuple[str, ...]]]:
    known = import_module("snntorch.surrogate")
    return {
        getattr(known, name)().__code__: entry for name, entry in _FACTORIES.items() if hasattr(known, name)
    }


def is_heaviside(function: SpikeFunction) -> bool:
    probe = torch.tensor([[-2.0, -1e-3, 0.0, 1e-3, 0.5, 2.0]])
    try:
        with torch.no_grad():
            return bool((function(probe) == (probe > 0)).all())
    except Exception:  # a user's function may refuse the probe
        return False


# --- pickling of the import-swap classes ---


def picklable_state(self: nn.Module) -> dict[str, Any]:
    """A module's state with its spike function as a :class:`Surrogate` where that is recognised.

    snnTorch's spike functions are closures, which do not pickle.
    """
    state = dict(vars(self))
    function = state.get("spike_grad")
    if inspect.isfunction(function) and "<locals>" in function.__qualname__:
        surrogate = recognise(function)
        if surrogate.kind != "custom":
            state["spike_grad"] = _Factory(surrogate)
    return state


def restored_state(self: nn.Module, state: dict[str, Any]) -> None:
    """Put back what :func:`picklable_state` made, with snnTorch's own spike function."""
    function = state.get("spike_grad")
    if isinstance(function, _Factory):
        state = {**state, "spike_grad": function.build()}
    nn.Module.__setstate__(self, state)


class _Factory:
    """Stands for a spike function in a pickle: which factory of snnTorch builds it again."""

    def __init__(self, surrogate: Surrogate) -> None:
        self.surrogate = surrogate

    def build(self) -> SpikeFunction:
        for name, (kind, parameters) in _FACTORIES.items():
            if kind == self.surrogate.kind:
                factory = getattr(import_module("snntorch.surrogate"), name)
                return factory(**dict(zip(parameters, self.surrogate.params, strict=True)))
        return self.surrogate
