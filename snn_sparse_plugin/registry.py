"""Plugins found through entry points, loaded on first use.

A broken third-party plugin is named in one warning and skipped; asked for by name, it raises.
"""

from __future__ import annotations

import importlib
import threading
import warnings
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from .errors import UnsupportedError

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


@dataclass
class Plugin:
    """One registered plugin: a class or factory, instantiated once by :meth:`load`.

    ``error`` is why that failed: it is not tried again before :func:`refresh`.
    """

    group: str
    name: str
    value: str
    distribution: str
    version: str
    error: str | None = None
    _instance: Any = field(default=None, repr=False)
    _loader: int | None = field(default=None, repr=False)  # the thread that loads it now

    def load(self) -> Any:
        """The plugin's object; raises :class:`UnsupportedError` naming the plugin if it cannot be loaded."""
        if self._instance is None:
            if self.error is not None:
                raise UnsupportedError(self._failure())
            self._loader = threading.get_ident()
            try:
                module, _, attribute = self.value.partition(":")
                factory = getattr(importlib.import_module(module), attribute)
                self._instance = factory()
            except Exception as error:  # third-party code may fail in any way
                self.error = f"{type(error).__name__}: {error}"
                raise UnsupportedError(self._failure()) from error
            finally:
                self._loader = None
        return self._instance

    def loading(self) -> bool:
        """Whether this thread is inside :meth:`load`, e.g. in an import that the plugin makes."""
        return self._loader == threading.get_ident()

    def _failure(self) -> str:
        return (
            f"{self.group[:-1]} {self.name!r} of {self.distribution} {self.version} "
            f"cannot be loaded: {self.error}"
        )


@cache
def plugins(group: str) -> dict[str, Plugin]:
    """All plugins registered in ``group``, by name; none is loaded yet.

    Example:
        >>> sorted(plugins("adapters"))[:2]
        ['norse', 'snntorch']
    """
    from . import __version__

    if group not in GROUPS:
        raise UnsupportedError(f"no plugin group {group!r}; groups are {', '.join(GROUPS)}.")
    found = {
        name: Plugin(group, name, value, "snn-sparse-plugin", __version__)
        for name, value in _BUILTIN[group].items()
    }
    for entry in entry_points(group=_PREFIX + group):
        if entry.name in found:
            if not entry.value.startswith("snn_sparse_plugin."):
                taken = found[entry.name]
                warnings.warn(
                    f"{_distribution(entry)} registers {group[:-1]} {entry.name!r}, a name already taken by "
                    f"{taken.distribution}; it is ignored.",
                    stacklevel=2,
                )
            continue
        found[entry.name] = Plugin(
            group, entry.name, entry.value, _distribution(entry), entry.dist.version if entry.dist else "?"
        )
    return found


def _distribution(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist else "an unnamed distribution"


def load(group: str, name: str) -> Any:
    """The plugin of that name; raises :class:`UnsupportedError` if there is none or it is broken."""
    found = plugins(group)
    if name not in found:
        raise UnsupportedError(f"no {group[:-1]} named {name!r}. Registered: {', '.join(sorted(found))}.")
    return found[name].load()


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
    plugins.cache_clear()
