"""Each neuron's calls, counted on its module with the reason why it is not fused."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from .. import tally
from .loading import adapter_of


def record_of(module: nn.Module) -> tally.Record:
    """What the module did in sparse mode, live."""
    return tally.of(module, _why_not_fused)


def running(module: nn.Module) -> AbstractContextManager[None]:
    """Inside the block, what runs is counted on this module; in a graph that is being compiled nothing is."""
    return nullcontext() if torch.compiler.is_compiling() else tally.running(record_of(module))


def _why_not_fused(module: nn.Module) -> str:
    if torch.jit.is_tracing():  # looking at its parameters would be traced as well
        return "traced"
    try:
        adapter = adapter_of(module)
        neuron = "no adapter describes it" if adapter is None else adapter.neuron(module)
        if isinstance(neuron, str):
            return neuron
        sequence = adapter is not None and adapter.takes_sequence(module)
        return "input that the fused op does not take" if sequence else "called step by step"
    except Exception as error:  # counting may not fail where upstream's own forward does not
        return f"its adapter failed with {type(error).__name__}"
