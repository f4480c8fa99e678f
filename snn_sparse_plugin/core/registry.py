"""Plugins found through entry points, loaded on first use.

A broken third-party plugin is named in one warning and skipped; asked for by name, it raises. What counts as broken is
said in :mod:`snn_sparse_plugin.core.contracts`.
"""

from __future__ import annotations

import importlib
import threading
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from .contracts import Broken, examine, guard, named
from .errors import UnsupportedError
from .version import VERSION

GROUPS = ("backends", "adapters", "learners", "layers")
_PREFIX = "snn_sparse_plugin."

# An uninstalled checkout has no entry points of its own, so the built-in plugins are listed here as well.
_BUILTIN = {
    "backends": {
        "cpu": "snn_sparse_plugin.backends.cpu:CPUBackend",
        "triton": "snn_sparse_plugin.backends.triton:TritonBackend",
        "torch_sparse": "snn_sparse_plugin.backends.torch_sparse:TorchSparseBackend",
        "reference": "snn_sparse_plugin.ops.spiking_layer.reference:ReferenceBackend",
    },
    "adapters": {
        "snntorch": "snn_sparse_plugin.adapters.snntorch:SnnTorchAdapter",
        "norse": "snn_sparse_plugin.adapters.norse:NorseAdapter",
    },
    "learners": {"eprop": "snn_sparse_plugin.learners.eprop:plugin"},
    "layers": {"ttfs": "snn_sparse_plugin.layers.ttfs:Plugin"},
}

_EXECUTOR = "snn_sparse_plugin.fusion.sequence", "hooked"


def executor() -> Any:
    """The function that runs hooked neurons fused. It lies in a higher room, so it is found by name as plugins are."""
    return getattr(importlib.import_module(_EXECUTOR[0]), _EXECUTOR[1])


_CONVERSIONS = {"cpu": "snn_sparse_plugin.backends.cpu.conversions"}


@cache
def conversions(device: str) -> Any:
    """The module of compiled conversions between dense spikes and events for a type of device, such as ``"cpu"``.

    None where there is none; torch operations do it then.
    """
    return importlib.import_module(_CONVERSIONS[device]) if device in _CONVERSIONS else None


@dataclass
class Plugin:
    """One registered plugin: a class or factory, instantiated once by :meth:`load`.

    ``error`` is why that failed, or why it is not used: it is not tried again before :func:`refresh`. ``trouble`` is
    the first question that a loaded third-party plugin failed to answer.
    """

    group: str
    name: str
    value: str
    distribution: str
    version: str
    error: str | None = None
    trouble: str | None = None
    _instance: Any = field(default=None, repr=False)
    _sound: bool = field(default=False, repr=False)
    _loader: int | None = field(default=None, repr=False)  # the thread that loads it now

    @property
    def ours(self) -> bool:
        """Whether it belongs to this package, whose plugins are used unchecked."""
        return self.value == _BUILTIN[self.group].get(self.name)

    def load(self) -> Any:
        """The plugin's object; raises :class:`UnsupportedError` naming the plugin if it cannot be loaded or used."""
        if not self._sound:
            if self.error is not None:
                raise UnsupportedError(self._failure())
            self._loader = threading.get_ident()
            try:
                made = self._made() if self._instance is None else self._instance
                if not self.ours:
                    self._check(made)
                self._instance, self._sound = made, True
            except KeyboardInterrupt:
                raise
            except Broken as error:
                self.error = f"cannot be used: {error}"
                raise UnsupportedError(self._failure()) from error
            except BaseException as error:  # third-party code may fail in any way, sys.exit() included
                self.error = f"cannot be loaded: {named(error)}"
                raise UnsupportedError(self._failure()) from error
            finally:
                self._loader = None
        return self._instance

    def _made(self) -> Any:
        module, _, attributes = self.value.partition("[")[0].strip().partition(":")
        found: Any = importlib.import_module(module)
        for name in attributes.split("."):
            found = getattr(found, name)
        return found()

    def _check(self, made: Any) -> None:
        examine(self.group, made)
        name = getattr(made, "name", None)
        for other in plugins(self.group).values():
            taken = other.name if other.ours else getattr(other._instance, "name", None)
            if other is not self and name is not None and name == taken:
                raise Broken(f"its name is {name!r}, which is that of {other.distribution} {other.version}")
        guard(self.group, made, self.report)

    def report(self, problem: str) -> None:
        """Warn of what a loaded plugin does wrong, once."""
        if self.trouble is None:
            self.trouble = problem
            warnings.warn(self._sentence(f"fails: {problem}"), stacklevel=4)

    def loading(self) -> bool:
        """Whether this thread is inside :meth:`load`, e.g. in an import that the plugin makes."""
        return self._loader == threading.get_ident()

    def _failure(self) -> str:
        return self._sentence(self.error or "")

    def holds(self, made: Any) -> bool:
        """Whether this is the plugin's object."""
        return self._instance is made

    def _sentence(self, what: str) -> str:
        return (
            f"{self.group[:-1]} {self.name!r} of {self.distribution} {self.version} {what}. "
            f"Update or uninstall {self.distribution}, or tell its authors."
        )


@cache
def plugins(group: str) -> dict[str, Plugin]:
    """All plugins registered in ``group``, by name; none is loaded yet.

    Example:
        >>> sorted(plugins("adapters"))[:2]
        ['norse', 'snntorch']
    """
    if group not in GROUPS:
        raise UnsupportedError(f"no plugin group {group!r}; groups are {', '.join(GROUPS)}.")
    found = {
        name: Plugin(group, name, value, "snn-sparse-plugin", VERSION)
        for name, value in _BUILTIN[group].items()
    }
    for entry in _entry_points(group):
        plugin = Plugin(group, entry.name, entry.value, *_distribution(entry))
        taken = found.get(entry.name)
        if taken is None:
            found[entry.name] = plugin
        elif not taken.ours or not entry.value.startswith("snn_sparse_plugin."):
            plugin.error = f"is ignored: the name is taken by {taken.distribution} {taken.version}"
            _ignored.append(plugin)
            warnings.warn(plugin._failure(), stacklevel=2)
    return found


_ignored: list[Plugin] = []


def listed(group: str) -> list[Plugin]:
    """All plugins of the group, and those that are ignored because their name is taken."""
    return [*plugins(group).values(), *(plugin for plugin in _ignored if plugin.group == group)]


def _entry_points(group: str) -> Iterable[EntryPoint]:
    try:
        return entry_points(group=_PREFIX + group)
    except Exception as error:  # the file of any installed distribution may be damaged
        warnings.warn(
            f"the entry points of the installed distributions cannot be read ({named(error)}): "
            f"only the {group} of snn-sparse-plugin are used. pip check may tell which distribution is damaged.",
            stacklevel=3,
        )
        return ()


def _distribution(entry: EntryPoint) -> tuple[str, str]:
    # without a METADATA file there is neither a name nor a version
    try:
        return entry.dist.name or "an unnamed distribution", entry.dist.version or "?"  # type: ignore[union-attr]
    except (AttributeError, KeyError, TypeError):
        return "an unnamed distribution", "?"


# what people call a backend by its device or its library
_MEANT = {"cuda": "triton", "gpu": "triton", "numba": "cpu", "torch": "reference", "pytorch": "reference"}


def check_name(group: str, name: str) -> None:
    """Raise :class:`UnsupportedError`, with the names there are, unless a plugin is registered under this one."""
    found = plugins(group)
    if name in found:
        return
    plain = name.lower().partition(":")[0].replace("-", "_")
    close = [_MEANT[plain]] if plain in _MEANT else get_close_matches(plain, found, 1)
    hint = f" Did you mean {close[0]!r}?" if close and close[0] in found else ""
    raise UnsupportedError(f"no {group[:-1]} named {name!r}. Registered: {', '.join(sorted(found))}.{hint}")


def load(group: str, name: str) -> Any:
    """The plugin of that name; raises :class:`UnsupportedError` if there is none or it is broken."""
    check_name(group, name)
    return plugins(group)[name].load()


def load_all(group: str) -> dict[str, Any]:
    """Every plugin of the group that loads; a broken one is reported once and skipped."""
    loaded = {}
    for name, plugin in plugins(group).items():
        if plugin.loading():  # it imports a library that is hooked: that asks for every adapter again
            continue
        reported = plugin.error is not None
        try:
            loaded[name] = plugin.load()
        except UnsupportedError as error:
            if not reported:
                warnings.warn(str(error), stacklevel=2)
    return loaded


def refresh() -> None:
    """Forget what was found and what failed, so that a distribution installed or repaired since is seen."""
    global _generation
    _ignored.clear()
    plugins.cache_clear()
    _generation += 1


_generation = 0


def generation() -> int:
    """Which search for plugins the current ones come from: what was chosen of an earlier one holds no more."""
    return _generation
