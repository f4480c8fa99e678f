"""All that a neuron's equations may depend on: attributes and tensors of its module, and whether they changed."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
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

    The buffers that hold a neuron's state are left out.
    """

    __slots__ = ("holds", "tensors")

    def __init__(self, adapter: Adapter, module: nn.Module) -> None:
        hidden = adapter.hidden_names(module)
        self.tensors: list[tuple[str, Tensor, int]] = []
        all_held: list[dict[str, Any]] = []
        kept: list[Any] = []
        form: list[tuple[int, tuple[str, ...]] | None] = []
        for owner in module.modules() if module._modules else (module,):
            attributes = vars(owner)
            dicts: list[dict[str, Any]] = [attributes, owner._parameters, owner._buffers, owner._modules]
            for held in dicts:
                without = _INNER if held is attributes else hidden if owner is module else ()
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
        self.holds = _comparison(tuple(form))(all_held, kept)
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


@lru_cache(maxsize=1024)
def _comparison(
    form: tuple[tuple[int, tuple[str, ...]] | None, ...],
) -> Callable[[Any, Any], Callable[[], bool]]:
    """Of dicts and a list of objects: whether they have these numbers of entries, and the very objects by these names.
    ``None`` stands for the cell of a closure, which has to have its object.

    It is asked at every call of a neuron, and so is written out: nothing in the library compares by identity in one
    go, and == would take another tensor of the same numbers for the same one.
    """
    tests: list[str] = []
    kept: list[str] = []
    for i, expected in enumerate(form):
        if expected is None:
            tests.append(f"d{i}.cell_contents is k{len(kept)}")
            kept.append(f"k{len(kept)}")
            continue
        count, names = expected
        tests.append(f"len(d{i}) == {count}" if count else f"not d{i}")
        for name in names:
            tests.append(f"d{i}[{name!r}] is k{len(kept)}")
            kept.append(f"k{len(kept)}")
    held = ", ".join(f"d{i}" for i in range(len(form)))
    source = f"""
def of(held, kept):
    ({held},) = held
    {f"({', '.join(kept)},) = kept" if kept else "pass"}
    def holds():
        try:
            return {" and ".join(tests)}
        except (KeyError, ValueError):
            return False
    return holds
"""
    made: dict[str, Any] = {}
    exec(source, made)
    return made["of"]  # type: ignore[no-any-return]
