"""How to build every neuron class of Norse: the rows of the table of supported neurons."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from .base import Example
from .norse_surrogates import METHODS

_NAMES = (
    *("LIF", "LIFCell", "LIFRecurrent", "LIFRecurrentCell", "LIFBoxCell", "IAF", "IAFCell"),
    *("LIFEx", "LIFExCell", "LIFExRecurrent", "LIFExRecurrentCell"),
    *("LIFAdEx", "LIFAdExCell", "LIFAdExRecurrent", "LIFAdExRecurrentCell"),
    *("LIFRefracCell", "LIFRefracRecurrent", "LIFRefracRecurrentCell"),
    *("LIFAdExRefracCell", "LIFAdExRefracRecurrent", "LIFAdExRefracRecurrentCell"),
    *("LSNN", "LSNNCell", "LSNNRecurrent", "LSNNRecurrentCell"),
    *("Izhikevich", "IzhikevichCell", "IzhikevichRecurrent", "IzhikevichRecurrentCell"),
    *("LI", "LICell", "LILinearCell", "LIBoxCell"),
    *("LIFMCRecurrentCell", "LIFMCRefracRecurrentCell", "CobaLIFCell", "LIFCorrelation"),
)
_WITH_WEIGHTS = ("LILinearCell", "CobaLIFCell", "LIFCorrelation")
_ADJOINT = (
    *("LIF", "LIFCell", "LIFRecurrent", "LIFRecurrentCell"),
    *("LIFRefracCell", "LIFRefracRecurrent", "LIFRefracRecurrentCell"),
)
NEURONS = 4


def examples() -> dict[str, Example]:
    """See :meth:`Adapter.examples`."""
    norse = import_module("norse.torch")
    return {name: _example(getattr(norse, name)) for name in _NAMES}


def _example(cls: Any) -> Example:
    snn, norse = import_module("norse.torch.module.snn"), import_module("norse.torch")
    name = cls.__name__
    recurrent = issubclass(cls, snn.SNNRecurrent | snn.SNNRecurrentCell)
    sizes = (NEURONS, NEURONS) if recurrent or name in _WITH_WEIGHTS or "Recurrent" in name else ()
    p = norse.tonic_spiking.p if name.startswith("Izhikevich") else _default(cls)
    fields = _fields(p)
    options: dict[str, Any] = {}
    if "method" in fields:
        options |= {f"method={method}": method for method in (*METHODS, "heaviside")}
        if name in _ADJOINT:
            options["method=adjoint"] = "adjoint"
    if "reset_method" in fields:
        options["reset_method=reset_subtract"] = norse.reset_subtract
        options["reset_method=own function"] = lambda z, v, v_reset, v_th: v - z * v_th / 2
    options |= {"p per neuron": True, "dt": 0.002}
    if "adjoint" in inspect.signature(cls.__init__).parameters:
        options["adjoint"] = True
    if recurrent:
        options |= {"autapses": True, "recurrent_weights": torch.eye(NEURONS).roll(1, 0)}
    if issubclass(cls, snn.SNN | snn.SNNRecurrent):
        options["record_states"] = True
    if name == "LIFCorrelation" or "MC" in name:
        options = {}  # never fused
    exactness = "up to the last bit of exp()" if "Ex" in name else ""
    return Example(partial(_made, cls, sizes, p), options, exactness)


def _default(cls: Any) -> Any:
    return inspect.signature(cls.__init__).parameters["p"].default


def _fields(p: Any) -> set[str]:
    """Names of the parameters; those of refractory neurons are nested."""
    return {
        name
        for field, value in p._asdict().items()
        for name in (_fields(value) if hasattr(value, "_asdict") else {field})
    }


def changed(p: Any, change: Callable[[str, Any], Any]) -> Any:
    """The same parameters, each as ``change(name, value)``."""
    return type(p)(
        **{n: changed(v, change) if hasattr(v, "_asdict") else change(n, v) for n, v in p._asdict().items()}
    )


def _made(cls: Any, sizes: tuple[int, ...], p: Any, **options: Any) -> Any:
    """The neuron; options that are fields of its parameters are put there."""
    inside = {name: options.pop(name) for name in _fields(p) & options.keys()}
    per_neuron = options.pop("p per neuron", False)

    def change(name: str, value: Any) -> Any:
        if per_neuron and name not in ("method", "alpha", "reset_method"):
            own: Tensor = float(value) * torch.linspace(0.875, 1.125, NEURONS)
            return own
        return inside.get(name, value)

    if "recurrent_weights" in options:
        options["recurrent_weights"] = nn.Parameter(options["recurrent_weights"].clone())
    if inside or per_neuron:
        p = changed(p, change)
    if cls.__name__.startswith("Izhikevich"):
        behaviour = import_module("norse.torch").tonic_spiking
        # upstream hands out the state itself, and marks it
        start = type(behaviour.s)(*(torch.as_tensor(part).detach().clone() for part in behaviour.s))
        return cls(*sizes, behaviour._replace(p=p, s=start), **options)
    return cls(*sizes, p=p, **options)
