"""Sparse training of spiking networks in snnTorch and Norse, without a rewrite."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .activity import ActivityLog, record_activity
    from .config import SparseConfig
    from .dynamics import NeuronParams, NeuronSpec, NeuronState
    from .equations import Equations
    from .errors import ConfigError, InputError, MissingDependencyError, SparsePluginError, UnsupportedError
    from .fusion.sequence import unroll
    from .learners.eprop import EProp
    from .mode import SparsityReport, restore, sparse_mode, sparsify
    from .spikes import SpikeTrain
    from .surrogates import Surrogate

# Loaded on first use: pytest imports our plugin, so this package, in every project of the environment.
_HOMES = {
    "ActivityLog": "activity",
    "ConfigError": "errors",
    "EProp": "learners.eprop",
    "Equations": "equations",
    "InputError": "errors",
    "MissingDependencyError": "errors",
    "NeuronParams": "dynamics",
    "NeuronSpec": "dynamics",
    "NeuronState": "dynamics",
    "SparseConfig": "config",
    "SparsePluginError": "errors",
    "SparsityReport": "mode",
    "SpikeTrain": "spikes",
    "Surrogate": "surrogates",
    "UnsupportedError": "errors",
    "record_activity": "activity",
    "restore": "mode",
    "sparse_mode": "mode",
    "sparsify": "mode",
    "unroll": "fusion.sequence",
}
_MODULES = {
    *_HOMES.values(),
    "adapters",
    "backends",
    "fusion",
    "learners",
    "ops",
    "plot",
    "registry",
    "tally",
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


def load_ipython_extension(shell: Any) -> None:
    """``%load_ext snn_sparse_plugin`` in IPython or Jupyter."""
    from .ipython import load_ipython_extension

    load_ipython_extension(shell)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
