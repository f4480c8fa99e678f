"""Neurons whose equations are known: those that an adapter describes, and our own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...adapters import Adapter
from ...adapters.base import Neuron
from ...core.canonical import traced
from ...core.dynamics import NeuronSpec
from ...core.equations import Equations
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


def per_neuron(value: Tensor | float, like: Tensor) -> Tensor:
    """A parameter as a row (N,), for states like (B, N).

    Raises:
        RuntimeError: it has another shape.
    """
    return torch.as_tensor(value, dtype=like.dtype, device=like.device).detach().expand(like.shape[-1:])
