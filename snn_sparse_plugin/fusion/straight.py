"""Networks of a Linear and a neuron in turn: decided once, and then run without asking until something has changed.

What is kept is for calls of one form and modules that are what they were: the same ones with the same attributes, whose
numbers are the same. Any other call takes the way that asks everything (executor.py), which for small layers takes
longer than their steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import Any, TypeGuard
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..adapters import has_hooks
from ..adapters.counting import record_of
from ..core import registry, tally
from ..core.config import SparseConfig
from ..core.precision import any_autocast
from ..core.spikes import SpikeTrain
from ..ops.spiking_layer.inputs import Synapses, pack_params
from ..ops.spiking_layer.prepared import SpikingLayerOutput, Step, like, run_chain
from .description import Description
from .fused import FusedCall, dense, note_last
from .known import Known, can_be_known
from .modules import is_plain_linear, is_unchanged
from .stepping import Flow, Layer

Form = tuple[Any, ...]


def form_of(x: Flow, config: SparseConfig, explicit: dict[str, Any], events: bool) -> Form | None:
    """What the decisions about a call depend on besides the network; None where they depend on more."""
    dtype = x.dtype
    if (
        type(x) not in (Tensor, SpikeTrain)
        or x.device.type != "cpu"  # waits, written out: numbers are looked at
        or len(x.shape) != 3
        or x.shape[0] < 2
        or 0 in x.shape
        or dtype not in (torch.float32, torch.float64)
        or not config.fuse_time
        or config.check
        or any_autocast()
        or tally.watchers.get() is not None
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._is_tracing()
        or torch.compiler.is_compiling()
    ):
        return None
    generation, learns = registry.generation(), torch.is_grad_enabled()
    return (type(x), x.shape, dtype, config, *explicit, events, generation, learns)


_kept: WeakKeyDictionary[nn.Module, dict[Form, Straight | None]] = WeakKeyDictionary()
_MOST = 16  # forms that are kept of a network


def recall(net: nn.Module, form: Form | None) -> Straight | None:
    """What is kept of a network for calls of this form, if it still is what it was."""
    known = _kept.get(net)
    found = None if known is None or form is None else known.get(form)
    return found if found is not None and found.holds(net) else None


def keep(net: nn.Module, form: Form | None, layers: list[Layer], calls: list[FusedCall]) -> None:
    """Keep what a call of this form has found, where it is no more than a neuron behind each Linear.

    A network that is another at every call is left alone, as is one that is more: to keep it takes its time, too.
    """
    if form is None:
        return
    known = _kept.setdefault(net, {})
    before = known.get(form)
    if form in known and (before is None or not before.used):
        known[form] = None
        return
    if len(known) >= _MOST:
        known.clear()
    straight = _is_straight(layers, calls)
    known[form] = Straight(net, layers, [_Pair(call) for call in calls]) if straight else None


def _is_straight(layers: list[Layer], calls: list[FusedCall]) -> bool:
    """Whether these calls are all that the layers do, and none of these stands at two places, where they take turns."""
    modules = [layer.module for layer in layers]
    called = [module for call in calls for module in (call.linear, call.layer.module)]
    return (
        len(called) == len(modules)
        and all(map(is_, called, modules))
        and len(set(map(id, modules))) == len(modules)
        and all(map(_is_decided, calls))
    )


def _is_decided(call: FusedCall) -> bool:
    """Whether nothing but the numbers of its input and its state is new in another call like this."""
    neuron, adapter, module = call.neuron, call.adapter, call.layer.module
    return (
        call.per_step
        and call.ready is not None
        and call.ready.layout.N > 0
        and call.half is None
        and neuron.surrogate.kind != "zero"
        and not adapter.wants_membrane(neuron)
        and adapter.keeps(module) == (None, None)
        and can_be_known(adapter, module, neuron, Description(adapter, module))
    )


class Straight:
    """A network as a call has found it: all that is in it, but not the network, which may be forgotten."""

    def __init__(self, net: nn.Module, layers: list[Layer], pairs: list[_Pair]) -> None:
        self.layers, self._pairs, self.used = layers, pairs, False
        self._chained = all(pair.emits_events for pair in pairs[:-1])
        self._modules = list(net._modules.values())
        self._inner = [(each, Straight(each, [], [])) for each in self._modules if _is_sequence(each)]

    def holds(self, net: nn.Module) -> bool:
        """Whether the network is what it was."""
        held = net._modules
        return (
            len(held) == len(self._modules)
            and all(map(is_, held.values(), self._modules))
            and _is_sequence(net)
            and all(as_found.holds(each) for each, as_found in self._inner)
            and all(pair.holds() for pair in self._pairs)
        )

    def run(
        self, x: Flow, states: Sequence[Any], events: bool
    ) -> tuple[Flow, Tensor | None, list[Any]] | None:
        """What ``executor.run`` gives; None where a state is not of the form that the neurons compute in."""
        begun = [pair.begin(state) for pair, state in zip(self._pairs, states[1::2], strict=True)]
        if None in begun:
            return None
        self.used = True
        starts, initial = zip(*begun, strict=True)  # type: ignore[arg-type]
        steps = [pair.step(start) for pair, start in zip(self._pairs, starts, strict=True)]
        outs = run_chain(x, steps) if self._chained else _run_each(x, steps)
        after = list(states)
        for k, pair in enumerate(self._pairs):
            after[2 * k + 1] = pair.end(outs[k], starts[k], initial[k])
        return (outs[-1].spikes if events else dense(outs[-1].spikes)), outs[-1].mem, after


def _is_sequence(module: nn.Module | None) -> TypeGuard[nn.Module]:
    return is_unchanged(module, (nn.Sequential,)) and not has_hooks(module)  # type: ignore[arg-type]


def _run_each(x: Flow, steps: list[Step]) -> list[SpikingLayerOutput]:
    outs = []
    for step in steps:
        with tally.running(step.ran):
            outs.append(step.ready.run(x, step.synapses, step.params, step.state))
        x = outs[-1].spikes
    return outs


class _Pair:
    """A Linear and the neuron behind it: one call of the op."""

    def __init__(self, call: FusedCall) -> None:
        assert call.ready is not None
        layout = call.ready.layout
        self._module, self._adapter, self._linear = call.layer.module, call.adapter, call.linear
        self._neuron, self._ready, self._T = call.neuron, call.ready, layout.T
        self._record = record_of(self._module)
        self.emits_events = call.ready.pattern.want_events
        shape = layout.B, *layout.features
        self._template = torch.empty((), dtype=layout.dtype).expand(shape)
        self._form = like(self._template)
        self._params = pack_params(self._neuron.params, layout)
        self._matrices = tuple(map(like, self._weights()))
        self._known = Known(
            self._adapter, self._module, self._neuron, Description(self._adapter, self._module)
        )

    def _weights(self) -> tuple[Tensor | None, Tensor | None]:
        held = self._linear._parameters  # type: ignore[union-attr]
        return held.get("weight"), held.get("bias")

    def holds(self) -> bool:
        """Whether the modules are what they were, and the neuron's parameters the same numbers."""
        return (
            not has_hooks(self._module)
            and is_plain_linear(self._linear)  # type: ignore[arg-type]
            and self._known.holds(self._module)
            and tuple(map(like, self._weights())) == self._matrices
        )

    def begin(self, state: Any) -> tuple[Any, Any] | None:
        """The state before the first step: -> (the op's form, the library's)."""
        start, initial = self._adapter.initial_state(self._module, self._neuron, self._template, state)
        fits = all(x is None or like(x) == self._form for x in (start.v, start.i))
        return (start, initial) if fits else None

    def step(self, start: Any) -> Step:
        """Its part of the chain."""
        return Step(self._ready, Synapses(*self._weights(), None, None), self._params, start, self._record)

    def end(self, out: SpikingLayerOutput, start: Any, initial: Any) -> Any:
        """The library's final state; what else upstream's forward leaves is left."""
        adapter, module = self._adapter, self._module
        if self._neuron.spec.spiking:
            note_last(adapter, module, out, start, self._T, membrane=False)
        state = adapter.final_state(module, out.state, initial)
        adapter.leave(module)
        return state
