"""All that a neuron's equations may depend on: attributes and tensors of its module, and whether they changed."""

from __future__ import annotations

from collections.abc import Callable
from operator import is_, itemgetter
from typing import Any

from torch import Tensor, nn

from ..adapters import Adapter

# what every module has besides; hooks are asked about at each call
_INNER = set(vars(nn.Module())) - {"training"}


def version(x: Tensor) -> int:
    return -1 if x.is_inference() else x._version


class Description:
    """A module as it is now: attributes, parameters and buffers by identity, tensors by version, too.

    The buffers that hold a neuron's state are left out.
    """

    __slots__ = ("empty", "holders", "tensors")

    def __init__(self, adapter: Adapter, module: nn.Module) -> None:
        hidden = adapter.hidden_names(module)
        self.empty: list[dict[str, Any]] = []
        self.holders: list[tuple[dict[str, Any], int, Callable[..., Any], Any]] = []
        self.tensors: list[tuple[str, Tensor, int]] = []
        for owner in module.modules():
            self._hold(vars(owner), _INNER)
            for held in (owner._parameters, owner._buffers, owner._modules):
                self._hold(held, hidden if owner is module else ())
            for value in vars(owner).values():
                self._note_tuple(value)

    def _hold(self, held: dict[str, Any], without: Any) -> None:
        names = [name for name in held if name not in without]
        self.tensors += [(n, held[n], version(held[n])) for n in names if isinstance(held[n], Tensor)]
        if names:
            pick = itemgetter(names[0], *names)  # two at least, so that it gives a tuple
            self.holders.append((held, len(held), pick, pick(held)))
        elif not held:
            self.empty.append(held)

    def _note_tuple(self, value: Any) -> None:
        """The tensors of Norse's parameters, which are nested named tuples."""
        if isinstance(value, tuple) and hasattr(value, "_asdict"):
            for name, item in value._asdict().items():
                if isinstance(item, Tensor):
                    self.tensors.append((name, item, version(item)))
                self._note_tuple(item)

    def holds(self) -> bool:
        """Whether the module still has these attributes and tensors."""
        try:
            for held, count, pick, kept in self.holders:
                if len(held) != count or not all(map(is_, pick(held), kept)):
                    return False
        except KeyError:
            return False
        return not any(self.empty)

    def changed_in_place(self) -> str | None:
        """The name of a tensor whose numbers are others now."""
        return next((name for name, tensor, before in self.tensors if version(tensor) != before), None)
