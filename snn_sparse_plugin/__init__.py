"""Sparse training of spiking networks in snnTorch and Norse, without a rewrite."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .core import moved, version

__version__ = version.VERSION

if TYPE_CHECKING:
    from .activity import ActivityLog, record_activity
    from .core.config import SparseConfig
    from .core.dynamics import NeuronParams, NeuronSpec, NeuronState
    from .core.equations import Equations
    from .core.errors import (
        ConfigError,
        InputError,
        MissingDependencyError,
        SparsePluginError,
        UnsupportedError,
    )
    from .core.spikes import SpikeTrain
    from .core.surrogates import Surrogate
    from .fusion.sequence import unroll
    from .learners.eprop import EProp
    from .mode import SparsityReport, restore, sparse_mode, sparsify

# Loaded on first use: pytest imports our plugin, so this package, in every project of the environment.
_HOMES = {
    "ActivityLog": "activity",
    "ConfigError": "core.errors",
    "EProp": "learners.eprop",
    "Equations": "core.equations",
    "InputError": "core.errors",
    "MissingDependencyError": "core.errors",
    "NeuronParams": "core.dynamics",
    "NeuronSpec": "core.dynamics",
    "NeuronState": "core.dynamics",
    "SparseConfig": "core.config",
    "SparsePluginError": "core.errors",
    "SparsityReport": "mode",
    "SpikeTrain": "core.spikes",
    "Surrogate": "core.surrogates",
    "UnsupportedError": "core.errors",
    "record_activity": "activity",
    "restore": "mode",
    "sparse_mode": "mode",
    "sparsify": "mode",
    "unroll": "fusion.sequence",
}
_MODULES = {
    *moved.HOMES,
    "activity",
    "adapters",
    "backends",
    "fusion",
    "learners",
    "mode",
    "ops",
    "plot",
    "readout",
}

__all__ = [
    "ActivityLog",
    "ConfigError",
    "EProp",
    "Equations",
    "InputError",
    "MissingDependencyError",
    "NeuronParams",
    "NeuronSpec",
    "NeuronState",
    "SparseConfig",
    "SparsePluginError",
    "SparsityReport",
    "SpikeTrain",
    "Surrogate",
    "UnsupportedError",
    "record_activity",
    "restore",
    "sparse_mode",
    "sparsify",
    "unroll",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        found = getattr(import_module(f".{_HOMES[name]}", __name__), name)
        globals()[name] = found
        return found
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


moved.install()


def load_ipython_extension(shell: Any) -> None:
    """``%load_ext snn_sparse_plugin`` in IPython or Jupyter."""
    from .interfaces.ipython import load_ipython_extension

    load_ipython_extension(shell)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
