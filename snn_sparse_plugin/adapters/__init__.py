"""What the package must know about an upstream library's neurons.

A library is described by one :class:`Adapter` in one file. Which of its neurons are sparse now is
decided per module and call by :func:`config_of`: a mark on the module (``sparsify``), on its class (the
import-swap faces), or the active sparse mode of this thread.
"""

from __future__ import annotations

from .active import (
    MARK,
    Mark,
    config_of,
    cuts_nothing,
    entered,
    is_unmarked,
    run_whole,
    settled,
    spike,
    spike_in_graph,
)
from .base import Adapter, Example, Neuron, runner
from .counting import record_of, refuse, running
from .hooks import has_hooks, hook, is_hook, patched
from .loading import adapter_of, install_adapters, installed_version, loaded_adapters, outside_tested

__all__ = [
    "MARK",
    "Adapter",
    "Example",
    "Mark",
    "Neuron",
    "adapter_of",
    "config_of",
    "cuts_nothing",
    "entered",
    "has_hooks",
    "hook",
    "install_adapters",
    "installed_version",
    "is_hook",
    "is_unmarked",
    "loaded_adapters",
    "outside_tested",
    "patched",
    "record_of",
    "refuse",
    "run_whole",
    "runner",
    "running",
    "settled",
    "spike",
    "spike_in_graph",
]
