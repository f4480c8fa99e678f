"""Each neuron's calls, counted on its module with the reason why it is not fused."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from ..core import tally
from .active import MARK
from .loading import adapter_of


def record_of(module: nn.Module) -> tally.Record:
    """What the module did in sparse mode, live."""
    mark = module.__dict__.get(MARK)
    return tally.of(module, _why_not_fused, None if mark is None else mark.record)


def refuse(module: nn.Module, why: str) -> None:
    """Note that a call of the module could have run fused if it were not for this: the reason that reports give."""
    if torch.compiler.is_compiling() or tally.is_aside():
        return
    record = record_of(module)
    if record.refused != why:
        record.refused = why
        record.look(_why_not_fused(module))


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
        refused = tally.refused(module)
        if refused:
            return refused
        assert adapter is not None
        return "only unroll runs it fused" if adapter.only_unroll(module) else "called step by step"
    except Exception as error:  # counting may not fail where upstream's own forward does not
        return f"its adapter failed with {type(error).__name__}"
