"""The states of a neuron module for one step, cut from the past: where each library keeps them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ...adapters.snntorch_neurons import STATES
from ...core.errors import UnsupportedError
from ...core.host import number
from .structure import Layer


@dataclass(eq=False)
class Original:
    """A neuron module as it runs by itself, and how it is used."""

    layer: Layer
    forward: Callable[..., Any]
    readout: bool
    sequence: bool  # whether it takes (T, B, N)
    library: str


class SnnTorchState:
    """A state kept in attributes of the module, and passed as arguments unless ``init_hidden``."""

    aliases: set[int]
    leaves: list[Tensor]

    def __init__(self, neuron: Original, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.neuron, self.module, self.x = neuron, neuron.layer.module, x
        names = _names(type(self.module))  # type: ignore[arg-type]
        if names is None:
            raise UnsupportedError(
                f"e-prop: {neuron.layer.name} is a {type(self.module).__name__}; of snnTorch it takes "
                f"{', '.join(STATES)}."
            )
        self.names = names
        given = dict(zip(self.names, args, strict=False)) | kwargs
        values = [v if (v := given.get(n)) is not None else getattr(self.module, n) for n in self.names]
        # upstream starts from zeros where the shape differs
        missing = [v.shape != x.shape for v in values]
        self.fresh = any(missing)
        self.leaves = [
            torch.zeros_like(x) if new else v.detach() for v, new in zip(values, missing, strict=True)
        ]
        self.aliases = {k for k, n in enumerate(self.names) if n == "spk"}

    def at(self, x: Tensor, leaves: Sequence[Tensor]) -> SnnTorchState:
        """The same state with other values, for another current."""
        other = copy.copy(self)
        other.x, other.leaves = x, list(leaves)
        return other

    def call(self) -> Any:
        if not self.module.init_hidden:
            return self.neuron.forward(self.x, *self.leaves)
        for name, leaf in zip(self.names, self.leaves, strict=True):
            setattr(self.module, name, leaf)
        return self.neuron.forward(self.x)

    def returned(self, z: Tensor, after: Sequence[Tensor]) -> Any:
        """What the module's own forward would keep and return after such a step."""
        adapter: Any = self.neuron.layer.adapter
        return adapter.write_call(self.module, z, dict(zip(self.names, after, strict=True)), None)

    def outputs(self, out: Any) -> tuple[Tensor, list[Tensor]]:
        after = [getattr(self.module, n) for n in self.names]
        z = after[-1] if self.neuron.readout else out[0] if isinstance(out, tuple) else out
        return z, after

    def detach(self) -> None:
        for name in self.names:
            setattr(self.module, name, getattr(self.module, name).detach())


@cache
def _names(kind: type) -> tuple[str, ...] | None:
    """The states of a class of snnTorch or one derived from it."""
    known = [c.__name__ for c in kind.__mro__ if c.__module__.startswith("snntorch.")]
    return next((names for name, names in STATES.items() if name in known), None)


def hidden(module: Any) -> tuple[Tensor, ...]:
    """What a neuron of snnTorch keeps inside between two steps; nothing where its states are passed."""
    names = _names(type(module)) if getattr(module, "init_hidden", False) else None  # type: ignore[arg-type]
    return tuple(getattr(module, name) for name in names or ())


def emptied(before: Sequence[Tensor], now: Sequence[Tensor]) -> bool:
    """Whether somebody has set a state to zero since; numbers are read only where other tensors stand there now."""
    if all(old is new for old, new in zip(before, now, strict=False)):
        return False
    return any(bool(x.any()) for x in before) and not any(bool(x.any()) for x in now)


class TupleState:
    """A state passed in and returned: Norse's and ours, and any ``forward(x, *state) -> (spikes, *state)``."""

    def __init__(self, neuron: Original, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.neuron, self.x = neuron, x
        state = (*args, *kwargs.values())
        self.fresh = all(s is None for s in state)
        if self.fresh:
            first = _initial(neuron, x)
            state = () if first is None else (first,)
        size = _size(neuron, x)
        self.tree, self.leaves = state, []
        for given in floats(state):
            value = given.detach()
            # Norse starts from single numbers
            value = value.expand(size) if value.dim() < len(size) else value
            self.leaves.append(value.to(x.dtype))
        self.aliases: set[int] = set()

    def at(self, x: Tensor, leaves: Sequence[Tensor]) -> TupleState:
        """The same state with other values, for another current."""
        other = copy.copy(self)
        other.x, other.leaves = x, list(leaves)
        return other

    def call(self) -> Any:
        leaves = iter(self.leaves)
        state = mapped(self.tree, lambda x: next(leaves) if x.is_floating_point() else x)
        return self.neuron.forward(self.x, *state)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all leaves."""
        return tuple(_named(self.tree, ""))

    def returned(self, z: Tensor, after: Sequence[Tensor]) -> Any:
        """What the module's own forward would return after such a step."""
        new = iter(after)
        return (z, *mapped(self.tree, lambda x: next(new) if x.is_floating_point() else x))

    def outputs(self, out: Any) -> tuple[Tensor, list[Tensor]]:
        if not isinstance(out, tuple):
            raise UnsupportedError(f"e-prop: {self.neuron.layer.name} must return (spikes, state).")
        z, rest = out[0], out[1:]
        after = floats(rest)
        if self.leaves and len(after) != len(self.leaves):
            raise UnsupportedError(
                f"e-prop: {self.neuron.layer.name} takes {len(self.leaves)} states and returns {len(after)}."
            )
        self.aliases = {k for k, s in enumerate(after) if s is z and not self.neuron.readout}
        return z, after

    def detach(self) -> None:
        pass


def _initial(neuron: Original, x: Tensor) -> Any:
    module: Any = neuron.layer.module
    if hasattr(module, "state_fallback"):
        return module.state_fallback(x)
    if neuron.library == "norse":  # LILinearCell makes its state inside forward
        v = torch.zeros(_size(neuron, x), dtype=x.dtype, device=x.device) + module.p.v_leak.detach()
        return import_module("norse.torch").LIState(v=v, i=torch.zeros_like(v))
    if hasattr(module, "initial_state"):
        return module.initial_state(x)
    if type(module).__name__ == "LeakyReadout":
        return x.new_zeros(x.shape[0], module.linear.out_features)
    return None


def _size(neuron: Original, x: Tensor) -> tuple[int, ...]:
    """(B, N) of the neuron's states, without the time of a sequence."""
    hidden = getattr(neuron.layer.module, "hidden_size", None)
    shape = x.shape[1:] if neuron.sequence else x.shape
    return (*shape[:-1], shape[-1] if hidden is None else int(number(hidden)))


def mapped(tree: Any, change: Callable[[Tensor], Any]) -> Any:
    """A state, of nested tuples, lists and dicts, with every tensor changed."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, tuple):
        parts = [mapped(x, change) for x in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    if isinstance(tree, list):
        return [mapped(x, change) for x in tree]
    if isinstance(tree, dict):
        return {key: mapped(x, change) for key, x in tree.items()}
    return tree


def _named(tree: Any, name: str) -> list[str]:
    """The names of the floating tensors of a state, in order: those of the fields they stand in."""
    if isinstance(tree, Tensor):
        return [name] if tree.is_floating_point() else []
    if isinstance(tree, tuple | list):
        names = getattr(tree, "_fields", None) or [name] * len(tree)
        return [found for own, x in zip(names, tree, strict=True) for found in _named(x, own)]
    if isinstance(tree, dict):
        return [found for own, x in tree.items() for found in _named(x, own)]
    return []


def floats(tree: Any) -> list[Tensor]:
    """The floating tensors of a state, in order."""
    if isinstance(tree, Tensor):
        return [tree] if tree.is_floating_point() else []
    if isinstance(tree, tuple | list | dict):
        return [y for x in (tree.values() if isinstance(tree, dict) else tree) for y in floats(x)]
    return []
