"""Hooks by which snnTorch's own methods run with the spike function masked."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..core import tally
from ..core.config import SparseConfig
from . import active, cut
from .active import (
    config_of,
    count_whole,
    here,
    is_watched,
    spike,
    spike_in_graph,
    uncut,
    window,
)
from .counting import record_of, running
from .snntorch_neurons import takes_sequence
from .snntorch_surrogates import SpikeFunction, recognise


def _seen(neuron: nn.Module, spike_grad: SpikeFunction) -> nn.Module:
    """The neuron with another spike function, so that upstream's own method runs on it."""
    seen: nn.Module = object.__new__(type(neuron))
    vars(seen).update(vars(neuron), spike_grad=spike_grad)
    return seen


def masked_method(upstream: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def masked(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        if active.idle:
            return upstream(self, *args, **kwargs)
        compiling = torch.compiler.is_compiling()
        if not compiling:
            whole = here.whole
            if whole is not None and whole[0] is self:
                return count_whole(whole[1], upstream(self, *args, **kwargs))
        function = self.spike_grad
        if compiling:
            in_graph = _Masked(
                self, lambda x: spike_in_graph(x, self, function, recognise, takes_sequence(type(self)))
            )
            return upstream(in_graph, *args, **kwargs)
        config = config_of(self)
        if config is None:
            return upstream(self, *args, **kwargs)
        mem = args[-1] if args else kwargs.get("mem")
        found = cut.look(id(self))
        if found is not None and found[0].config is config and _may_cut(mem) and found[0].holds(self):
            before, here.cut = here.cut, found[0]
            try:
                return upstream(self, *args, **kwargs)
            finally:
                here.cut = before
        way = uncut(config, mem)
        if way == "no_grad" and torch.is_grad_enabled():
            way = uncut(config, self.threshold)
        if way is None:
            surrogate = recognise(function)
            threshold = window(surrogate, config)
            if threshold is None and not is_watched():
                way = "exact"
        if way is not None:
            record_of(self).count(way)
            return upstream(self, *args, **kwargs)
        sequence = takes_sequence(type(self))
        if (
            threshold is not None
            and not sequence
            and surrogate.kind not in ("zero", "custom")
            and _may_cut(mem)
        ):
            cut.keep(self, config, function, surrogate, threshold)
        with running(self):
            return upstream(
                _seen(self, lambda x: spike(x, function, surrogate, config, sequence)), *args, **kwargs
            )

    return masked


def _may_cut(mem: Any) -> bool:
    """Whether a step on this membrane has a gradient, which nobody wants to know more of than that it is masked."""
    return (
        type(mem) is Tensor
        and mem.requires_grad
        and torch.is_grad_enabled()
        and here.whole is None
        and not here.settled
        and not tally.watchers.blocks.get()  # is_watched, written out
        and not torch._C._are_functorch_transforms_active()
    )


class _Masked:
    """The same in a graph that is being compiled."""

    def __init__(self, neuron: nn.Module, spike_grad: SpikeFunction) -> None:
        self._neuron, self.spike_grad = neuron, spike_grad

    def __getattr__(self, name: str) -> Any:
        return getattr(self._neuron, name)


class MaskedAttribute:
    """``spike_grad`` of a class that calls it directly: masked while the module is sparse."""

    def __get__(self, module: Any | None, owner: type | None = None) -> Any:
        if module is None:
            return self
        attributes = vars(module)  # a spike function that is a module lives in _modules
        function = attributes.get("spike_grad")
        if function is None:
            function = attributes.get("_modules", {}).get("spike_grad")
        if function is None:
            raise AttributeError("spike_grad")
        if torch.compiler.is_compiling():
            return partial(
                spike_in_graph,
                module=module,
                function=function,
                recognise=recognise,
                sequence=takes_sequence(type(module)),
            )
        config = config_of(module)
        if config is None:
            return function
        return partial(_counted_spike, module=module, function=function, config=config)

    def __set__(self, module: Any, function: SpikeFunction) -> None:
        vars(module)["spike_grad"] = function


def _counted_spike(x: Tensor, module: nn.Module, function: SpikeFunction, config: SparseConfig) -> Tensor:
    with running(module):
        return spike(x, function, recognise(function), config, takes_sequence(type(module)))
