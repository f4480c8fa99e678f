"""All that a neuron's equations may depend on: attributes and tensors of its module, and whether they changed."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

from torch import Tensor, nn

from ..adapters import Adapter

# what every module has besides; hooks are asked about at each call
_INNER = set(vars(nn.Module())) - {"training"}


def version(x: Tensor) -> int:
    return -1 if x.is_inference() else x._version


class Description:
    """A module as it is now: attributes, parameters and buffers by identity, tensors by version, too.

    The buffers that hold a neuron's state, and what else a forward leaves in it, are left out.
    """

    __slots__ = ("holds", "tensors")

    def __init__(self, adapter: Adapter, module: nn.Module) -> None:
        hidden, left = adapter.hidden_names(module), _INNER.union(adapter.left)
        self.tensors: list[tuple[str, Tensor, int]] = []
        all_held: list[dict[str, Any]] = []
        kept: list[Any] = []
        form: list[tuple[int, tuple[str, ...]] | None] = []
        for owner in module.modules() if module._modules else (module,):
            attributes = vars(owner)
            dicts: list[dict[str, Any]] = [attributes, owner._parameters, owner._buffers, owner._modules]
            for held in dicts:
                without = left if held is attributes else hidden if owner is module else ()
                now = dict(held)  # a finalizer may run the module between two lines of this
                names = tuple(name for name in now if name not in without)
                form.append((len(now), names))
                all_held.append(held)
                kept += [now[name] for name in names]
                self.tensors += [(n, now[n], version(now[n])) for n in names if isinstance(now[n], Tensor)]
            for value in list(attributes.values()):
                if isinstance(value, tuple):
                    self._note_tuple(value)
                elif isinstance(value, FunctionType) and value.__closure__:
                    self._note_closure(value.__closure__, all_held, kept, form)
        self.holds = _comparison(form, all_held, kept)
        """Whether the module still has these attributes and tensors."""

    @staticmethod
    def _note_closure(cells: Any, all_held: list[Any], kept: list[Any], form: list[Any]) -> None:
        """What a function of snnTorch's factories has for parameters."""
        for cell in cells:
            all_held.append(cell)
            kept.append(cell.cell_contents)
            form.append(None)

    def _note_tuple(self, value: Any) -> None:
        """The tensors of Norse's parameters, which are nested named tuples."""
        if hasattr(value, "_asdict"):
            for name, item in value._asdict().items():
                if isinstance(item, Tensor):
                    self.tensors.append((name, item, version(item)))
                elif isinstance(item, tuple):
                    self._note_tuple(item)

    def changed_in_place(self) -> str | None:
        """The name of a tensor whose numbers are others now."""
        return next((name for name, tensor, before in self.tensors if version(tensor) != before), None)


def _comparison(
    form: list[tuple[int, tuple[str, ...]] | None], held: list[Any], kept: list[Any]
) -> Callable[[], bool]:
    """Whether dicts have these numbers of entries, and the very objects by these names, which are in ``kept`` in order.
    ``None`` stands for the cell of a closure, which has to have its object.

    By identity: == would take another tensor of the same numbers for the same one.
    """
    dicts, cells, values = [], [], iter(kept)
    for each, expected in zip(held, form, strict=True):
        if expected is None:
            cells.append((each, next(values)))
        else:
            count, names = expected
            dicts.append((each, count, [(name, next(values)) for name in names]))

    def holds() -> bool:  # asked at every call of a neuron
        try:
            for each, count, entries in dicts:
                if len(each) != count:
                    return False
                for name, value in entries:
                    if each[name] is not value:
                        return False
            for cell, value in cells:
                if cell.cell_contents is not value:
                    return False
        except (KeyError, ValueError):
            return False
        return True

    return holds
