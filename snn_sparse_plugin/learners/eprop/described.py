"""Neurons whose equations are known: those that an adapter describes, and our own."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ...adapters import Adapter
from ...adapters.base import Neuron
from ...core.dynamics import PARAM_NAMES, NeuronSpec
from ...core.equations import Equations
from ...ops.spiking_layer import reference
from .lsnn import LSNN
from .network import LeakyReadout

# what vectorised functions of torch and of a kernel round differently: spikes would not be the model's
_INEXACT = ("exp", "log")
_INTEGRATOR = Equations("y = kappa * y + x", ("y",), membrane="y")


def described(module: nn.Module, adapter: Adapter | None, readout: bool) -> Neuron | str:
    """A neuron by its equations, or why it has none here.

    A readout has to be one whose spikes, if it has any, come from its membrane as it is after the step.
    """
    found = _own(module) if adapter is None else _of_library(module, adapter)
    if isinstance(found, str):
        return found
    spec = found.spec
    if readout and spec.spiking and not (isinstance(spec, NeuronSpec) and spec.timing == "delayed"):
        return "a readout whose spikes are not those of its membrane"
    program = equations(found).program
    if any(op.kind in _INEXACT for op in program.ops):
        return "its equations have an exp or log"
    if found.surrogate.kind == "custom":
        return "its spike function is not a known one"
    if found.recurrent_diagonal is not None or found.output is not None or len(program.inputs) > 1:
        return "it is more than a neuron behind one current"
    return found


def equations(neuron: Neuron) -> Equations:
    """The equations of a described neuron."""
    return neuron.spec if isinstance(neuron.spec, Equations) else traced(neuron.spec, neuron.recurrent)


def parameters(neuron: Neuron) -> dict[str, Tensor | float]:
    """Its parameters by the names that its equations have for them."""
    return dict(neuron.params if isinstance(neuron.params, Mapping) else neuron.params._asdict())


def _own(module: Any) -> Neuron | str:
    if type(module) is LSNN:
        return module.neuron()
    if type(module) is LeakyReadout:
        linear, values = module.linear, {"kappa": module.kappa}
        return Neuron(_INTEGRATOR, values, input_weight=linear.weight, input_bias=linear.bias)
    return "it is of no library"


def _of_library(module: nn.Module, adapter: Adapter) -> Neuron | str:
    # the adapter does not know that it is us who stand in for its forward
    ours = vars(module).pop("forward", None)
    try:
        return adapter.neuron(module)
    finally:
        if ours is not None:
            module.__dict__["forward"] = ours


@cache
def traced(spec: NeuronSpec, recurrent: bool) -> Equations:
    """A member of the canonical family as equations: what its specification does to symbols.

    Example:
        >>> print(traced(NeuronSpec(reset="none"), False).text)
        v_next = ((mem * v) + x)
        s = spike((((mem * v) + x) - threshold))
        v = v_next
    """
    names: Any = [_Symbol(name) for name in PARAM_NAMES]
    states = ("v", "i") if spec.synapse else ("v",)
    x, rec, v, i = (_Symbol(name) for name in ("x", "rec", "v", "i"))
    _, s, *after = reference.step(
        spec,
        names,
        x,  # type: ignore[arg-type]
        rec if recurrent else None,  # type: ignore[arg-type]
        v,  # type: ignore[arg-type]
        i if spec.synapse else None,  # type: ignore[arg-type]
        lambda x: _Symbol(f"spike({x})"),  # type: ignore[arg-type, return-value]
    )
    lines = [f"{name}_next = {value}" for name, value in zip(states, after, strict=False)]
    lines += [f"s = {s}"] if spec.spiking else []
    # all states advance at once
    return Equations("\n".join(lines + [f"{name} = {name}_next" for name in states]), states)


class _Symbol:
    """Stands for a tensor, and remembers what is done to it."""

    dtype = None

    def __init__(self, text: str) -> None:
        self.text = text

    def __str__(self) -> str:
        return self.text

    def __add__(self, other: Any) -> _Symbol:
        return _Symbol(f"({self} + {other})")

    def __sub__(self, other: Any) -> _Symbol:
        return _Symbol(f"({self} - {other})")

    def __rsub__(self, other: Any) -> _Symbol:
        return _Symbol(f"({other} - {self})")

    def __mul__(self, other: Any) -> _Symbol:
        return _Symbol(f"({self} * {other})")

    def __neg__(self) -> _Symbol:
        return _Symbol(f"(-{self})")

    def __gt__(self, zero: int) -> _Symbol:
        return _Symbol(f"above({self})")

    def to(self, dtype: None) -> _Symbol:
        return self

    def detach(self) -> _Symbol:
        return _Symbol(f"detach({self})")


def per_neuron(value: Tensor | float, like: Tensor) -> Tensor:
    """A parameter as a row (N,), for states like (B, N).

    Raises:
        RuntimeError: it has another shape.
    """
    return torch.as_tensor(value, dtype=like.dtype, device=like.device).detach().expand(like.shape[-1:])
