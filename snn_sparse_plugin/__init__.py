"""Sparse training of spiking networks in snnTorch and Norse, without a rewrite."""

__version__ = "0.1.0"

from .config import SparseConfig
from .dynamics import NeuronParams, NeuronSpec, NeuronState
from .errors import ConfigError, InputError, MissingDependencyError, SparsePluginError, UnsupportedError
from .fusion.sequence import unroll
from .mode import SparsityReport, restore, sparse_mode, sparsify
from .spikes import SpikeTrain
from .surrogates import Surrogate

__all__ = [
    "ConfigError",
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
    "restore",
    "sparse_mode",
    "sparsify",
    "unroll",
]
