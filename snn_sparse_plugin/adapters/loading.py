"""Which adapters there are: found through entry points, hooked when their library is imported."""

from __future__ import annotations

import re
import sys
import threading
import warnings
from collections.abc import Sequence
from importlib import metadata
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NamedTuple

from torch import nn

from ..core import registry
from ..core.contracts import named
from .base import Adapter, runner
from .hooks import placed


def loaded_adapters() -> list[Adapter]:
    """Adapters whose library has been imported, with their hooks in place."""
    found = [a for a in registry.load_all("adapters").values() if a.package in sys.modules]
    for adapter in found:
        if adapter not in _installed and adapter not in _refused:
            _install(adapter)
    return [adapter for adapter in found if adapter not in _refused]


_installed: list[Adapter] = []
_refused: list[Adapter] = []


def _install(adapter: Adapter) -> None:
    # before an adapter keeps upstream's functions: those have to see numbers
    runner().install()
    outside = outside_tested(adapter)
    try:
        adapter.install()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a third party's may call sys.exit()
        owner = next(p for p in registry.plugins("adapters").values() if p.holds(adapter))
        if owner.ours and not outside:
            raise
        _refused.append(adapter)
        failed = f"hooking them failed with {named(error)}"
        if owner.ours:
            outside += f" Its neurons stay exact: {failed}"
        else:
            owner.report(f"its neurons stay exact: {failed}")
    else:
        _installed.append(adapter)
    if outside:
        warnings.warn(outside, stacklevel=4)


def outside_tested(adapter: Adapter) -> str:
    """A sentence if the installed version of the library is outside the adapter's tested range, else ``""``."""
    there, version = adapter.available()
    numbers = _numbers(version)
    if not there or adapter.tested is None or not numbers:
        return ""
    oldest, newest = map(_numbers, adapter.tested)
    if oldest <= numbers and numbers[: len(newest)] <= newest:
        return ""
    return (
        f"{adapter.name} {version} is outside the range that snn-sparse-plugin is tested with, "
        f"{' to '.join(dict.fromkeys(adapter.tested))}: compare its results with upstream's before relying on them."
    )


def _numbers(version: str) -> tuple[int, ...]:
    """``"1.0.2rc1"`` as (1, 0, 2)."""
    leading = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, leading.group().split("."))) if leading else ()


class _LateImports(MetaPathFinder):
    """Hooks a library that is imported only after sparse mode was entered."""

    def __init__(self) -> None:
        # asked at every import of the process: the names are found once, by install_adapters
        self.packages: frozenset[str] = frozenset()
        self._here = threading.local()

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> ModuleSpec | None:
        if name not in self.packages or getattr(self._here, "searching", False):
            return None
        self._here.searching = True
        try:
            return self._hooked(name, path, target)
        finally:
            self._here.searching = False

    def _hooked(self, name: str, path: Sequence[str] | None, target: Any) -> ModuleSpec | None:
        for finder in sys.meta_path:
            spec = finder.find_spec(name, path, target) if finder is not self else None
            if spec is not None and spec.loader is not None:
                execute = spec.loader.exec_module

                def exec_module(module: ModuleType) -> None:
                    execute(module)  # noqa: B023, the loop ends here
                    loaded_adapters()

                spec.loader.exec_module = exec_module  # type: ignore[method-assign]
                return spec
        return None


_late_imports = _LateImports()


class _Found(NamedTuple):
    """What :func:`install_adapters` came to, for as long as it would come to the same."""

    search: int  # that of the registry
    hooked: list[Adapter]
    asked: list[Adapter]  # those that have to be asked whether their hooks are there
    others: list[str]  # packages that are not imported

    def holds(self) -> bool:
        if self.search != registry.generation():
            return False
        for package in self.others:
            if package in sys.modules:
                return False
        return not self.others or _late_imports in sys.meta_path


_found: _Found | None = None


def install_adapters() -> None:
    """Hook every supported library, those that are not imported yet as soon as they are."""
    global _found
    if _found is not None and _found.holds():
        hooked = _found.asked if placed.hold() else _found.hooked
    else:
        hooked = loaded_adapters()
        adapters = registry.load_all("adapters").values()
        _late_imports.packages = frozenset(adapter.package for adapter in adapters)
        if len(hooked) < len(adapters) and _late_imports not in sys.meta_path:
            sys.meta_path.insert(0, _late_imports)
        if len(adapters) == len(registry.plugins("adapters")):
            others = [adapter.package for adapter in adapters if adapter.package not in sys.modules]
            asked = [adapter for adapter in hooked if not adapter.noted]
            _found = _Found(registry.generation(), hooked, asked, others)
    for adapter in hooked:
        adapter.repair()


def adapter_of(module: nn.Module, adapters: list[Adapter] | None = None) -> Adapter | None:
    """The adapter that owns a neuron module, or None."""
    for adapter in loaded_adapters() if adapters is None else adapters:
        if adapter.owns(module):
            return adapter
    return None


def installed_version(distribution: str) -> tuple[bool, str]:
    """Whether a library is installed: (True, version), or (False, what to do)."""
    try:
        return True, metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False, f"not installed: pip install {distribution}"
