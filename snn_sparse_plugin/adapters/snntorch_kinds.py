"""Which neuron of the fused families a module of snnTorch is: decided once, and again when what decides it has changed.

What a decision holds are classes, functions and formulas. Numbers and tensors are read at every call.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from operator import attrgetter, is_
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from ..core.surrogates import Surrogate
from .hooks import patched
from .snntorch_neurons import WHY_NOT, Classes, Parts, builders
from .snntorch_surrogates import SpikeFunction, depends_on, is_made_by_factory, recognise


class Kind(NamedTuple):
    """A fused family, and the member of it that a module is."""

    surrogate: Surrogate
    build: Callable[..., Parts | str] | None  # what describes it; None: the canonical family
    reset: str | None  # None: its equations have one alone
    scales: bool  # whether its forward scales spikes by ``graded_spikes_factor``
    synapse: bool
    recurrent: bool


def kind_of(module: nn.Module) -> Kind | str:
    """The kind of a neuron, or why it is in no fused family."""
    looked_at = _looked_at(module)
    if looked_at is None:
        return _decided(module)
    before, found = _kept.get(module, ((), ""))
    if len(before) != len(looked_at) or not all(map(is_, before, looked_at)):
        found = _decided(module)
        _kept[module] = looked_at, found
    return found


_kept: WeakKeyDictionary[nn.Module, tuple[tuple[Any, ...], Kind | str]] = WeakKeyDictionary()


def _looked_at(module: nn.Module) -> tuple[Any, ...] | None:
    """All that the kind depends on, to be compared by identity; None where it is decided anew at each call.

    Nothing in it holds the module: a spike function of the user's might, and so would a method that replaces one of it.
    """
    held, kind = module.__dict__, type(module)
    function, cls = held.get("spike_grad"), _fused_class(kind)  # type: ignore[arg-type]
    if cls is None or not held.keys().isdisjoint(METHODS) or not is_made_by_factory(function):
        return None
    try:
        methods = _read(kind) if kind is cls else (*_read(kind), *_read(cls))
        quantised, inhibited = bool(held["state_quant"]), bool(held["inhibition"])
        reset = (
            held["reset_delay"],
            held["state_function"].__func__,
            held["state_function"].__self__ is module,
        )
        needs = depends_on(function)
    except (AttributeError, KeyError, ValueError):
        return None
    derivative = needs[-2]  # its backward is the last
    return (
        kind,
        *methods,
        quantised,
        inhibited,
        *reset,
        function,
        *needs,
        getattr(derivative, "forward", None),
    )


METHODS = ("forward", "fire", "mem_reset", "_base_state_function")
_read = attrgetter(*METHODS, "_base_sub", "_base_zero", "_base_int")


def _decided(module: Any) -> Kind | str:
    cls = _fused_class(type(module))  # type: ignore[arg-type]
    if cls is None:
        name = type(module).__name__
        return WHY_NOT.get(name, f"{name} is in no fused family")
    own = next((method for method in METHODS if method in vars(module)), None)
    if own is not None:
        return f"it overrides {own}()"
    methods = [getattr(c, method, None) for c in (type(module), cls) for method in METHODS]
    changed = _changed(cls, *methods)
    if changed is not None:
        return changed
    steps = cls is not Classes().DeltaLeaky  # whose forward ignores both options
    if steps and getattr(module, "state_quant", False):
        return "state_quant is a Python function on the membrane of every step"
    if steps and getattr(module, "inhibition", False):
        return "inhibition lets only the neuron with the highest membrane fire"
    function = spike_function(module)
    surrogate = recognise(function)
    if is_made_by_factory(function) and any(isinstance(x, Tensor) for x in depends_on(function)):
        return "a parameter of its spike function is a tensor, whose number may be another at every step"
    if not surrogate.pure:
        named = getattr(surrogate.function, "__qualname__", type(surrogate.function).__qualname__)
        return f"its spike function {named} is none of snnTorch's, so that upstream calls it at every step"
    build, by_reset = builders().get(cls, (None, True))
    if not by_reset:
        return Kind(surrogate, build, None, steps, False, False)
    # state_function is chosen at construction; only reset_delay=False also looks at reset_mechanism_val
    functions: dict[Any, str] = {cls._base_sub: "subtract", cls._base_zero: "zero", cls._base_int: "none"}
    reset = functions.get(getattr(module.state_function, "__func__", None))
    if reset is None or module.state_function.__self__ is not module:
        return "its state_function was replaced"
    snn = Classes()
    synapse, recurrent = cls in (snn.Synaptic, snn.RSynaptic), cls in (snn.RLeaky, snn.RSynaptic)
    return Kind(surrogate, build, reset, steps, synapse, recurrent)


def spike_function(module: Any) -> SpikeFunction:
    """``spike_grad`` as the user set it: a hooked class masks the attribute."""
    function = vars(module).get("spike_grad")
    if function is None:  # a module
        function = vars(module)["_modules"].get("spike_grad")
    return module.spike_grad if function is None else function  # type: ignore[no-any-return]


@lru_cache(maxsize=1024)
def _fused_class(kind: type) -> Any:
    """The class of a fused family that this is or inherits from."""
    snn = Classes()
    family = (*builders(), snn.Leaky, snn.Synaptic, snn.RLeaky, snn.RSynaptic)
    return next((cls for cls in family if issubclass(kind, cls)), None)


@lru_cache(maxsize=1024)
def _changed(cls: type, *methods: Any) -> str | None:
    """Why a class whose methods are the first of these does not do what ``cls``, with the others, does upstream."""
    for method, its, upstream in zip(METHODS, methods, methods[len(METHODS) :], strict=False):
        if its is not upstream:
            return f"it overrides {method}()"
        foreign = patched(cls, method, import_module("snntorch"))
        if foreign is not None:
            return foreign
    return None
