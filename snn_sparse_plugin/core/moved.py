"""Modules that other people's programs import by the names that they had at first."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_PACKAGE = __name__.partition(".")[0]

HOMES = {
    **{
        name: f"core.{name}"
        for name in ("config", "dynamics", "equations", "errors", "registry", "spikes", "surrogates", "tally")
    },
    **{name: f"interfaces.{name}" for name in ("cli", "demo", "doctor", "pytest_plugin", "session")},
}
"""Where the public ones among them are now."""


class _Moved(MetaPathFinder, Loader):
    """Gives the very module at its new place; asked only where nothing is found at the old one."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: object = None) -> ModuleSpec | None:
        package, _, module = name.partition(".")
        return ModuleSpec(name, self) if package == _PACKAGE and module in HOMES else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = import_module(f".{HOMES[spec.name.partition('.')[2]]}", _PACKAGE)
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        # the import system has written its own there
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


def install() -> None:
    """Once, when the package is imported."""
    if not any(isinstance(finder, _Moved) for finder in sys.meta_path):
        sys.meta_path.append(_Moved())
