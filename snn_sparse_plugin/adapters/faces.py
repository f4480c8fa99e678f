"""What the import-swap faces share: every name of the original, and its sub-modules."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from torch import nn

from ..core.errors import MissingDependencyError
from . import MARK, Mark, loaded_adapters


def import_upstream(package: str, extra: str) -> ModuleType:
    """The original library; a missing one is an error that says what to install."""
    try:
        module = importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package.partition(".")[0]:
            raise
        raise MissingDependencyError(f"{extra} is not installed: pip install {extra}") from error
    loaded_adapters()
    return module


def sparse_class(upstream: type, face: str, *bases: type) -> type:
    """A subclass of the same name whose instances are always sparse; ``bases`` come behind the original."""
    namespace = {"__doc__": upstream.__doc__, "__module__": face, "__qualname__": upstream.__qualname__}
    return type(upstream)(upstream.__name__, (upstream, *bases), namespace | {MARK: Mark()})


def sparse_classes(upstream: Iterable[type], face: str) -> list[type]:
    """:func:`sparse_class` of each; where one original derives from another, so do the sparse ones."""
    made: dict[type, type] = {}
    for cls in sorted(upstream, key=lambda cls: len(cls.__mro__)):
        parent = next((made[base] for base in cls.__mro__ if base in made), None)
        made[cls] = sparse_class(cls, face, *([] if parent is None else [parent]))
    return list(made.values())


@contextmanager
def as_upstream(model: nn.Module) -> Iterator[None]:
    """Inside the block the model's face modules have upstream's own classes, for code that compares them."""
    changed: list[tuple[Any, Any]] = [
        (m, type(m)) for m in model.modules() if isinstance(vars(type(m)).get(MARK), Mark)
    ]
    try:
        for module, cls in changed:
            module.__class__ = cls.__base__
        yield
    finally:
        for module, cls in changed:
            module.__class__ = cls


def passthrough(face: str, upstream: ModuleType) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Module-level ``__getattr__`` and ``__dir__`` that hand out the original's names and sub-modules."""

    def getattribute(name: str) -> Any:
        if hasattr(upstream, name):
            return getattr(upstream, name)
        if not name.startswith("__") and find_spec(f"{upstream.__name__}.{name}") is not None:
            return importlib.import_module(f"{upstream.__name__}.{name}")
        raise AttributeError(f"module {face!r} has no attribute {name!r}")

    def directory() -> list[str]:
        return sorted({*vars(sys.modules[face]), *dir(upstream)})

    _aliases.packages[face] = upstream.__name__
    return getattribute, directory


class _Aliases(MetaPathFinder, Loader):
    """``import snn_sparse_plugin.snntorch.functional`` is ``snntorch.functional``, the same module object."""

    def __init__(self) -> None:
        self.packages: dict[str, str] = {}
        self.specs: dict[str, ModuleSpec | None] = {}

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> ModuleSpec | None:
        original = self._original(name)
        return ModuleSpec(name, self) if original and find_spec(original) else None

    def _original(self, name: str) -> str | None:
        for face, package in self.packages.items():
            if name.startswith(face + "."):
                return package + name[len(face) :]
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        original = self._original(spec.name)
        assert original is not None
        module = importlib.import_module(original)
        self.specs[spec.name] = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        # the import system has put the alias's spec on the original: give it its own back
        alias = module.__spec__
        assert alias is not None
        module.__spec__ = self.specs.pop(alias.name)


_aliases = _Aliases()
sys.meta_path.append(_aliases)
