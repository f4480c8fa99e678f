"""All that a neuron's equations may depend on: attributes and tensors of its module, and whether they changed."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import count
from types import FunctionType, MethodType
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..adapters import Adapter

# what every module has besides; hooks are asked about at each call
_INNER = set(vars(nn.Module())) - {"training"}
_DICTS = ("", "_parameters", "_buffers", "_modules")


def version(x: Tensor) -> int:
    return -1 if x.is_inference() else x._version


class _Held(NamedTuple):
    """What one dict of a module holds that counts. ``entries``: names, whether each is a method of the module itself,
    and how many cells there are in the closure of each."""

    path: tuple[str, ...]  # of the module, from the one that is described
    which: str  # of its dicts: "" are its attributes
    size: int
    entries: tuple[tuple[str, bool, int], ...]


class Description:
    """A module as it is now: attributes, parameters and buffers by identity, tensors by version, too.

    The buffers that hold a neuron's state, and what else a forward leaves in it, are left out.
    """

    __slots__ = ("holds", "kept", "tensors")

    def __init__(self, adapter: Adapter, module: nn.Module) -> None:
        hidden, left = adapter.hidden_names(module), _INNER.union(adapter.left)
        self.tensors: list[tuple[str, Tensor, int]] = []
        self.kept: list[Any] = []
        form: list[_Held] = []
        for path, owner in module.named_modules() if module._modules else (("", module),):
            attributes = vars(owner)
            for which in _DICTS:
                without = left if not which else hidden if owner is module else ()
                held = attributes[which] if which else attributes
                now = dict(held)  # a finalizer may run the module between two lines of this
                entries = []
                for name, value in now.items():
                    if name not in without:
                        entries.append((name, *_note(value, owner, self.kept)))
                        if isinstance(value, Tensor):
                            self.tensors.append((name, value, version(value)))
                        elif isinstance(value, tuple):
                            self._note_tuple(value)
                form.append(_Held(tuple(path.split(".")) if path else (), which, len(now), tuple(entries)))
        self.holds: Callable[[nn.Module], bool] = _comparison(tuple(form))(*self.kept)
        """Whether the module still has these. It is asked for, as what is known of it must not keep it alive."""

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


def _note(value: Any, owner: nn.Module, kept: list[Any]) -> tuple[bool, int]:
    """Keep what has to stay the same of a value; what :class:`_Held` says of it."""
    if isinstance(value, MethodType) and value.__self__ is owner:
        kept.append(value.__func__)
        return True, 0
    kept.append(value)
    # what a function of snnTorch's factories has for parameters
    cells = (value.__closure__ or ()) if isinstance(value, FunctionType) else ()
    for cell in cells:
        kept += cell, cell.cell_contents
    return False, len(cells)


@lru_cache(maxsize=256)
def _comparison(form: tuple[_Held, ...]) -> Callable[..., Callable[[nn.Module], bool]]:
    """What makes of the values that were kept, in order, a function: whether a module's dicts have these sizes, and the
    very objects by these names.

    By identity: == would take another tensor of the same numbers for the same one. As code, because it is asked at
    every step of a neuron, and a loop over the names takes twice the time.
    """
    values, lines = (f"v{k}" for k in count()), []
    used = 0
    for path, which, size, entries in form:
        owner = "module" + "".join(f"._modules[{name!r}]" for name in path)
        tests = [f"len(held) != {size}"]
        for name, is_method, cells in entries:
            value = f"held[{name!r}]"
            tests.append(f"{value}{'.__func__' if is_method else ''} is not {next(values)}")
            if is_method:
                tests.append(f"{value}.__self__ is not {owner}")
            tests += [f"{next(values)}.cell_contents is not {next(values)}" for _ in range(cells)]
            used += 1 + 2 * cells
        lines += [f"held = {owner}.{which or '__dict__'}", f"if {' or '.join(tests)}: return False"]
    code = [
        f"def make({', '.join(f'v{k}' for k in range(used))}):",
        " def holds(module):",
        "  try:",
        *(f"   {line}" for line in lines),
        "  except (AttributeError, KeyError, ValueError):",
        "   return False",
        "  return True",
        " return holds",
    ]
    made: dict[str, Any] = {}
    exec("\n".join(code), made)
    return made["make"]  # type: ignore[no-any-return]
