"""What was found out about neurons: the next step loop, too, mostly meets them as they were."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Size, Tensor, nn

from ..adapters import Adapter, Neuron
from ..core.by_identity import ByIdentity
from ..core.dynamics import NeuronSpec
from ..core.host import waits
from .description import Description


class Known:
    """A neuron as its adapter has read it, and whether it still is that one.

    Only for neurons whose parameters are numbers without gradients, and of which an adapter says by one object what
    they are (:meth:`Adapter.kind`).
    """

    def __init__(self, adapter: Adapter, module: nn.Module, neuron: Neuron, description: Description) -> None:
        self.neuron, self.description = neuron, description
        self._shapes: dict[Any, Size | str] = {}
        self._numbers = [_Number(x) for _, x, _ in description.tensors]
        self._adapter, self._kind = adapter, adapter.kind(module)

    def shape_of_step(self, form: Any, ask: Callable[[], Size | str]) -> Size | str:
        """The shape of its output for inputs and states of this form, or why such steps are not recorded."""
        found = self._shapes.get(form)
        if found is None:
            if len(self._shapes) >= _MOST_SHAPES:
                self._shapes.clear()
            found = self._shapes[form] = ask()
        return found

    def holds(self, module: nn.Module) -> bool:
        """Whether the module is what it was, and its parameters are the same numbers."""
        return (
            self.description.holds(module)
            and self._adapter.kind(module) is self._kind
            and all(map(_Number.holds, self._numbers))
        )


class _Number:
    """A tensor of one number, which is asked whether it still is that one at every step of a neuron.

    So it is read where it stands: to make a number of a tensor takes several times as long.
    """

    __slots__ = ("_cell", "_form", "_place", "_tensor", "_value")

    def __init__(self, x: Tensor) -> None:
        self._tensor, self._form = x, _form_of(x)
        plain = type(x) in (Tensor, nn.Parameter) and not x.is_neg()  # others say what they do not stand on
        cell, self._place = (_CELLS.get(x.dtype), x.data_ptr()) if plain else (None, 0)
        self._cell = cell.from_address(self._place) if cell is not None and self._place else None
        self._value = float(x)

    def holds(self) -> bool:
        x = self._tensor
        if _form_of(x) != self._form:
            return False
        if self._cell is None:
            return float(x) == self._value
        return x.data_ptr() == self._place and self._cell.value == self._value


def _form_of(x: Tensor) -> tuple[Any, ...]:
    return x.dim(), x.numel(), x.dtype, x.requires_grad, x.is_neg()


_CELLS: dict[torch.dtype, Any] = {
    torch.float32: ctypes.c_float,
    torch.float64: ctypes.c_double,
    torch.int64: ctypes.c_int64,
    torch.bool: ctypes.c_bool,
}


def can_be_known(adapter: Adapter, module: nn.Module, neuron: Neuron, description: Description) -> bool:
    """Whether all that may change of a neuron is what :class:`Known` looks at."""
    return (
        isinstance(neuron.spec, NeuronSpec)
        and adapter.kind(module) is not None
        and not module._modules
        and neuron.output is None
        and neuron.input_weight is None
        and not neuron.recurrent
        and all(_is_number(x) for _, x, _ in description.tensors)
    )


def _is_number(x: Tensor) -> bool:
    return x.numel() == 1 and not x.requires_grad and not waits(x)


_neurons: ByIdentity[Known] = ByIdentity()
_PLAIN = (bool, int, float, str, type(None))
_MOST_SHAPES = 64


def _stands_alone(value: Any) -> bool:
    """Whether nothing that an attribute refers to may be the module, as something of the user's may."""
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        others = value.__defaults__, value.__kwdefaults__, value.__dict__
        return not any(others) and all(isinstance(x, _PLAIN) for x in cells)
    return isinstance(value, (*_PLAIN, Tensor, CellType))


def recall(module: nn.Module) -> Known | None:
    """What is known of a neuron that is what it was."""
    known = _neurons.get(module)
    if known is None or not known.holds(module) or known.description.changed_in_place():
        return None
    return known


def keep(adapter: Adapter, module: nn.Module, neuron: Neuron, description: Description) -> None:
    """Know this neuron from now on, for as long as its module lives, if that can be."""
    if (
        can_be_known(adapter, module, neuron, description)
        and all(map(_stands_alone, description.kept))
        and not torch.is_inference_mode_enabled()  # whose tensors take part in no graph
    ):
        _neurons[module] = Known(adapter, module, neuron, description)
