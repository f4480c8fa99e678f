"""snnTorch's spike functions: closures, recognised by the code of the factories that made them."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from functools import cache
from importlib import import_module
from operator import is_
from types import FunctionType
from typing import Any

from torch import Tensor, nn

from ..core.by_identity import ByIdentity
from ..core.errors import ConfigError
from ..core.host import number
from ..core.surrogates import Surrogate

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

_recognised: ByIdentity[tuple[tuple[Any, ...], Surrogate]] = ByIdentity()
"""Functions of snnTorch's factories: their code and what they depend on, and the surrogate that they were with it."""


def recognise(function: SpikeFunction) -> Surrogate:
    """The surrogate behind a ``spike_grad``, by the code and closure of snnTorch's factories; nothing is called.

    Anything unknown becomes a ``Surrogate("custom")`` that is not pure: it may count its calls, draw random numbers or
    have parameters, so that only upstream calls it. A function of yours that depends on nothing but x is fused as
    ``Surrogate("custom", function=...)``.

    Example:
        >>> from snntorch import surrogate
        >>> recognise(surrogate.fast_sigmoid(slope=100))
        fast_sigmoid(slope=100)
    """
    if isinstance(function, Surrogate):
        return function
    if is_made_by_factory(function):
        needs = function.__code__, *depends_on(function)
        before, found = _recognised.get(function) or ((), None)
        if len(before) != len(needs) or not all(map(is_, before, needs)):
            found = _by_code(function)
            if found is not None and not any(isinstance(x, Tensor) for x in needs):
                _recognised[function] = needs, found
    else:
        found = _by_class(function)
    return Surrogate("custom", function=function, pure=False) if found is None else found


def is_made_by_factory(function: Any) -> bool:
    """Whether this is what one of snnTorch's factories returns, or its disabled surrogate."""
    return type(function) is FunctionType and form_of(function) is not None


def form_of(function: Any) -> Any:
    """What :func:`_codes` says of a function; None where it says nothing."""
    code = function.__code__
    found = _forms.get(id(code))
    if found is None:
        form = _codes().get(code)
        if form is None:
            return None
        found = _forms[id(code)] = code, form
    return found[1]


_forms: dict[int, tuple[Any, tuple[str, str, tuple[str, ...]]]] = {}
"""By identity: to hash code is to read all of it, at every step."""


def depends_on(function: Any) -> tuple[Any, ...]:
    """What a function of snnTorch's factories takes from outside: its closure, and the derivative of its class."""
    cells = tuple(cell.cell_contents for cell in function.__closure__ or ())
    cls = _class_of(function)
    return (*cells, cls, None if cls is None else vars(cls).get("backward"))


def _class_of(function: Any) -> Any:
    """The autograd Function that one of snnTorch's spike functions applies."""
    return function.__globals__.get(form_of(function)[0])


def is_upstreams(cls: Any) -> bool:
    """Whether an autograd Function is snnTorch's own, and nobody has put another derivative in its place."""
    folder = os.path.dirname(str(import_module("snntorch").__file__))
    methods = [getattr(cls, name, None) for name in ("forward", "backward")]
    return all(method is not None and method.__code__.co_filename.startswith(folder) for method in methods)


def _by_code(function: Any) -> Surrogate | None:
    code: Any = function.__code__
    _, kind, names = form_of(function)
    if kind == "zero":
        return Surrogate(kind)
    if not is_upstreams(_class_of(function)):
        return None
    closure = dict(zip(code.co_freevars, (c.cell_contents for c in function.__closure__ or ()), strict=True))
    return _surrogate(kind, *(closure[name] for name in names))


def _by_class(function: SpikeFunction) -> Surrogate | None:
    # `Heaviside.apply`, or LeakyParallel's private ATan.apply with its default parameter
    cls = getattr(function, "__self__", None)
    if getattr(function, "__name__", "") != "apply" or not isinstance(cls, type):
        return None
    if not is_upstreams(cls):
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
        return Surrogate(kind, tuple(number(p) for p in params))
    except (TypeError, ValueError, RuntimeError, ConfigError):  # e.g. one slope per neuron
        return None


@cache
def _codes() -> dict[Any, tuple[str, str, tuple[str, ...]]]:
    """By the code of what a factory returns: the autograd Function's name, our kind and its parameters."""
    snn, known = import_module("snntorch"), import_module("snntorch.surrogate")
    disabled = ("", "zero", ())
    codes: dict[Any, tuple[str, str, tuple[str, ...]]] = {
        cls._surrogate_bypass.__code__: disabled for cls in (snn.SpikingNeuron, snn.LeakyParallel)
    }
    for name, entry in _FACTORIES.items():
        code = getattr(known, name)().__code__ if hasattr(known, name) else None
        if code is not None:
            codes[code] = (code.co_names[0], *entry)
    return codes


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
