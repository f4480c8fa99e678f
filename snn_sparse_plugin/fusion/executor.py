"""Layers one after the other, each over all steps: Linear and neuron as one call of the fused op."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import Neuron, config_of, has_hooks, refuse
from ..core import tally
from ..core.config import current_config
from ..core.errors import InputError
from ..core.host import is_device, waits
from ..core.precision import any_autocast
from ..core.spikes import SpikeTrain
from ..ops.spiking_layer.products import are_few
from .context import paused
from .convolutions import (
    fits,
    norm_of_module,
    of_module,
    pool_of_module,
    pooled_events,
    spike_pool_of_module,
    takes,
)
from .fused import FusedCall, dense
from .governor import LARGE
from .modules import is_plain_linear, keeps_events
from .opened import joined, opened, stepped_together
from .stepping import Flow, Layer, Passed, apply, loop


def run(
    layers: list[Layer],
    x: Flow,
    states: list[Any],
    *,
    per_step: bool,
    events: bool = False,
    want_mem: bool = True,
    fused: list[FusedCall] | None = None,
) -> tuple[Flow, Tensor | None, list[Any]]:
    """All layers over all steps: -> (spikes, membrane of the last layer, one state per layer).

    ``fused`` takes the calls of the op, of a network whose layers are called step by step.
    """
    alone = per_step and _is_step(x)
    if alone or (per_step and (not current_config().fuse_time or _shares_state(layers))):
        with paused() if alone else nullcontext():
            spikes, mem, states = loop(layers, dense(x), states)
        return (spikes_as_events(spikes, layers) if events else spikes), mem, states
    if per_step or not current_config().fuse_time:
        return _run(layers, x, states, per_step, events, want_mem, fused)
    parts = [opened(layer) for layer in layers]
    # a layer of several parts keeps no state
    inner = [state for state, own in zip(states, parts, strict=True) for _ in own]
    out, mem, inner = _run([part for own in parts for part in own], x, inner, per_step, events, want_mem)
    return out, mem, [inner[end - 1] for end in accumulate(map(len, parts))]


def _run(
    layers: list[Layer],
    x: Flow,
    states: list[Any],
    per_step: bool,
    events: bool,
    want_mem: bool,
    fused: list[FusedCall] | None = None,
) -> tuple[Flow, Tensor | None, list[Any]]:
    neurons = [_fusable(layer, per_step) for layer in layers]
    passed, index = Passed(x), 0
    while index < len(layers):
        made = _convolved(layers, neurons, index, passed.flow, per_step)
        if made is not None:
            passed, index = Passed(made[0]), index + made[1]
            continue
        pooled = None if neurons[index] is not None else _pooled(layers[index], passed.flow, per_step)
        if pooled is not None:
            passed, index = Passed(pooled), index + 1
            continue
        stepped = stepped_together(layers[index:], passed.flow, per_step)
        if len(stepped) > 1:
            passed, index = apply(joined(stepped), passed.flow, None, per_step), index + len(stepped)
            continue
        linear = None
        if _joins_next(layers, neurons, index, passed.flow, per_step):
            linear = _linear(layers[index], per_step)
            index += 1
        layer, neuron, last = layers[index], neurons[index], index == len(layers) - 1
        found = None
        if neuron is not None:
            name = layer.label if linear is None else f"{layers[index - 1].name}→{layer.name}"
            call = FusedCall(layer, neuron, linear, name, states[index], per_step, last)
            # few spikes are multiplied as they are
            sparse = not are_few(passed.flow) and _takes_events(
                layers, neurons, index + 1, passed.flow, per_step
            )
            as_events = events if last else sparse
            found = call.run(passed.flow, as_events, want_mem and last)
            call.adapter.leave(layer.module)
            if fused is not None:
                fused.append(call)
        if found is None:
            flow = passed.flow
            if linear is not None:
                flow = apply(layers[index - 1], flow, None, per_step).flow
            found = apply(layer, flow, states[index], per_step, want_mem and last)
        passed, states[index] = found, found.state
        index += 1
    out = spikes_as_events(passed.flow, layers) if events else dense(passed.flow)
    return out, passed.mem, states


def run_neuron(layer: Layer, x: Tensor, state: Any) -> Passed | None:
    """One sequence neuron on (T, B, N...), or None where upstream's forward must run."""
    assert layer.adapter is not None
    neuron = layer.adapter.neuron(layer.module)
    if isinstance(neuron, str):
        return None
    # hooks of the module itself are run by the call that brought us here
    return FusedCall(layer, neuron, None, layer.label, state, per_step=False).run(x, False, False)


# --- what can be fused ---


def _is_step(x: Flow) -> bool:
    """Whether there is but a small step without gradient, which upstream's own code runs in half the time."""
    if not isinstance(x, Tensor) or len(x) != 1 or torch.is_grad_enabled() or x.device.type != "cpu":
        return False
    return x.numel() < LARGE and tally.watchers.get() is None


def _shares_state(layers: list[Layer]) -> bool:
    """Whether a neuron that keeps its state inside stands at two places: they take turns at every step."""
    if len({id(layer.module) for layer in layers}) == len(layers) and not any(
        layer.module._modules for layer in layers
    ):
        return False
    uses = Counter(module for layer in layers for module in layer.module.modules())
    return any(
        uses[layer.module] > 1
        for layer in layers
        if layer.adapter is not None and layer.adapter.read_state(layer.module) is not None
    )


def _fusable(layer: Layer, per_step: bool) -> Neuron | None:
    if layer.adapter is None:
        return None
    if has_hooks(layer.module):
        refuse(layer.module, "hooks, which run at every step")
        return None
    config = config_of(layer.module)
    if config is None or not config.fuse_time or layer.adapter.takes_sequence(layer.module) == per_step:
        return None
    neuron = layer.adapter.neuron(layer.module)
    return None if isinstance(neuron, str) else neuron


def _plain(layer: Layer, per_step: bool) -> nn.Module | None:
    """The module of a layer that is applied at every step; None where it takes all steps."""
    return layer.module if per_step or layer.lifted else None


def _linear(layer: Layer, per_step: bool) -> nn.Linear | None:
    """The plain Linear of a layer, which does the same at every step in either case."""
    module = _plain(layer, per_step) or layer.module
    return module if isinstance(module, nn.Linear) and is_plain_linear(module) else None


def _joins_next(
    layers: list[Layer], neurons: list[Neuron | None], index: int, flow: Flow, per_step: bool
) -> bool:
    """Whether this layer is a Linear that runs inside the next layer's call."""
    if index + 1 >= len(layers) or neurons[index] is not None or len(flow.shape) != 3:
        return False
    neuron = neurons[index + 1]
    if neuron is None or neuron.input_weight is not None or _linear(layers[index], per_step) is None:
        return False
    # under autocast the product has another dtype: the Linear itself runs then
    return not (any_autocast() and torch.is_autocast_enabled(flow.device.type))


def _convolved(
    layers: list[Layer], neurons: list[Neuron | None], index: int, flow: Flow, per_step: bool
) -> tuple[Tensor, int] | None:
    """What a convolution makes of the flow, with batch norm and pool behind it, and how many layers that are; None for
    others."""
    if neurons[index] is not None:
        return None
    found = of_module(_plain(layers[index], per_step))
    if found is None or not takes(found.weight, flow) or (isinstance(flow, Tensor) and flow.stride(0) == 0):
        return None
    dims = found.weight.dim() - 2
    behind = [_plain(layer, per_step) for layer in layers[index + 1 : index + 3]]
    norm = norm_of_module(behind[0], dims) if behind else None
    if not fits(norm, found.weight):
        norm = None
    pool_at = 0 if norm is None else 1
    pool = pool_of_module(behind[pool_at], dims) if len(behind) > pool_at else None
    used = 1 + (norm is not None) + (pool is not None)
    return found.run(flow, norm, pool, layers[index].label), used


def _pooled(layer: Layer, flow: Flow, per_step: bool) -> SpikeTrain | None:
    """The events that a pool makes of events; None for other layers and flows."""
    if not isinstance(flow, SpikeTrain):
        return None
    return pooled_events(flow, spike_pool_of_module(_plain(layer, per_step)))


def _takes_events(
    layers: list[Layer], neurons: list[Neuron | None], index: int, flow: Flow, per_step: bool
) -> bool:
    """Whether spikes that enter at ``index`` reach a weight matrix of the fused op as they are, or pooled."""
    pools = not is_device(flow.device)

    def passes(layer: Layer) -> bool:
        return bool(keeps_events(layer.module)) or (
            pools and spike_pool_of_module(_plain(layer, per_step)) is not None
        )

    while index < len(layers) and neurons[index] is None and passes(layers[index]):
        index += 1
    if index >= len(layers):
        return False
    neuron = neurons[index]
    if neuron is not None:
        return neuron.input_weight is not None
    if of_module(_plain(layers[index], per_step)) is not None:
        return True
    following = neurons[index + 1] if index + 1 < len(layers) else None
    joins = following is not None and following.input_weight is None
    return joins and _linear(layers[index], per_step) is not None


def spikes_as_events(flow: Flow, layers: list[Layer]) -> SpikeTrain:
    """The spikes of the last layer as events; InputError where it emits none."""
    if isinstance(flow, SpikeTrain):
        return flow
    last = layers[-1]
    neuron = None if last.adapter is None else last.adapter.neuron(last.module)
    if neuron is None or (isinstance(neuron, Neuron) and not neuron.spec.spiking):
        raise InputError(f"events=True wants spikes, but the last layer {last.label} emits none.")
    binary = isinstance(neuron, Neuron) and neuron.output is None
    train = SpikeTrain.from_dense(flow, binary=binary and waits(flow))
    return train._replace(carrier=flow.flatten(2)) if flow.requires_grad else train
