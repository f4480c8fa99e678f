"""Layers that are not fused: called with the meaning that upstream gives them, step by step where need be."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..adapters import Adapter, has_hooks
from ..core.errors import InputError
from ..core.spikes import SpikeTrain
from .modules import applies_per_sample, is_batch_norm, keeps_events

Flow = Tensor | SpikeTrain
"""What passes between layers: (T, B, N...), dense or events."""


@dataclass
class Layer:
    """One module of a sequence, and what its library says about it."""

    name: str
    module: nn.Module
    adapter: Adapter | None = None  # the owner of a neuron
    wrapper: Adapter | None = None  # the owner of a wrapper such as Norse's Lift
    stateful: bool = False  # called as module(x, state) although no adapter owns it
    lifted: bool = False  # a wrapper applies it at every step, in a network written for (T, B, ...) too

    @property
    def label(self) -> str:
        kind = type(self.module).__name__
        return f"{self.name} ({kind})" if self.name else kind


class Passed(NamedTuple):
    """What a layer made of all steps: its output, its membrane where wanted, and its final state."""

    flow: Flow
    mem: Tensor | None = None
    state: Any = None


def check_features(name: str, shape: torch.Size, expected: int) -> None:
    """Raise :class:`InputError` unless the last dimension is what a weight expects."""
    if shape[-1] != expected:
        raise InputError(
            f"{name}: input has shape {tuple(shape)}, weight expects {expected} features. "
            f"Check the encoder's number of channels or the size of the layer before."
        )


def apply(layer: Layer, flow: Flow, state: Any, per_step: bool, want_mem: bool = False) -> Passed:
    """One layer over all steps. ``per_step``: the network is written for (B, ...), not for (T, B, ...)."""
    module, per_step = layer.module, per_step or layer.lifted
    if isinstance(flow, SpikeTrain):
        kept = None if has_hooks(module) else keeps_events(module, flow, per_step)
        if isinstance(kept, SpikeTrain):
            return Passed(kept)
        flow = flow.to_dense()
    if isinstance(module, nn.Linear):
        check_features(layer.label, flow.shape, module.in_features)
    if not per_step:
        if layer.adapter is None and not layer.stateful:
            return Passed(module(_writable(flow, module)))
        if layer.adapter is not None:
            return Passed(*layer.adapter.step(module, flow, state))
        out, state = module(flow, state)
        return Passed(out, state=state)
    if layer.adapter is None and not layer.stateful and applies_per_sample(module, flow.dim()):
        return Passed(_once(module, flow))
    return _steps(layer, flow, state, want_mem)


def _once(module: nn.Module, flow: Tensor) -> Tensor:
    """A per-sample module on all steps at once; on one step where all are the same tensor."""
    T, B = flow.shape[:2]
    if T > 1 and flow.stride(0) == 0:
        out = module(flow[0])
        return out.expand(T, *out.shape)
    return module(_writable(flow.flatten(0, 1), module)).unflatten(0, (T, B))


def _steps(layer: Layer, flow: Tensor, state: Any, want_mem: bool) -> Passed:
    if not len(flow):
        return Passed(_nothing(layer, flow), state=state)
    start(layer, state)
    outs, mems = [], []
    for x in flow.unbind(0):
        out, mem, state = _step(layer, x if layer.adapter else _writable(x, layer.module), state)
        outs.append(out)
        mems.append(mem if want_mem else None)
    return Passed(torch.stack(outs), _stack(mems), finish(layer, state))


def loop(layers: list[Layer], flow: Tensor, states: list[Any]) -> tuple[Tensor, Tensor | None, list[Any]]:
    """The step loop itself: at every step through all layers."""
    if not len(flow):
        for layer in layers:
            flow = _nothing(layer, flow)
        return flow, None, states
    for layer, state in zip(layers, states, strict=True):
        start(layer, state)
    outs, mems = [], []
    mem: Tensor | None = None
    for x in flow.unbind(0):
        for index, layer in enumerate(layers):
            if isinstance(layer.module, nn.Linear):
                check_features(layer.label, x.shape, layer.module.in_features)
            x, mem, states[index] = _step(layer, x, states[index])
        outs.append(x)
        mems.append(mem)
    states = [finish(layer, state) for layer, state in zip(layers, states, strict=True)]
    return torch.stack(outs), _stack(mems), states


def _writable(x: Tensor, module: nn.Module) -> Tensor:
    """The input of a module; a copy where it may write there: autograd takes no writing into one step of several, nor
    into what the layer before has kept."""
    return x.clone() if x.requires_grad and _may_write(module) else x


def _may_write(module: nn.Module) -> bool:
    """Whether the module may write into its input: torch's own say so, of others nobody knows."""
    if isinstance(module, nn.Sequential) and len(module) and is_batch_norm(module[0]):
        return False  # the others write into what that has made
    return any(getattr(m, "inplace", not _is_torchs(m.forward)) for m in module.modules())


def _is_torchs(forward: Any) -> bool:
    return str(getattr(forward, "__module__", "")).startswith("torch.nn.")


def start(layer: Layer, state: Any) -> None:
    """Put an explicit state into a module that keeps its state inside."""
    if layer.adapter is not None and state is not None:
        layer.adapter.write_state(layer.module, state)


def finish(layer: Layer, state: Any) -> Any:
    """The state after the last step, from inside the module where it is kept there."""
    kept = layer.adapter.read_state(layer.module) if layer.adapter is not None else None
    return state if kept is None else kept


def _step(layer: Layer, x: Tensor, state: Any) -> tuple[Tensor, Tensor | None, Any]:
    if layer.adapter is not None:
        return layer.adapter.step(layer.module, x, state)
    if layer.stateful:
        out, state = layer.module(x, state)
        return out, None, state
    out = layer.module(x)
    if not isinstance(out, Tensor):
        raise InputError(f"{layer.label} returned a {type(out).__name__}; only tensors pass between layers.")
    return out, None, None


def _stack(mems: list[Tensor | None]) -> Tensor | None:
    found = [mem for mem in mems if mem is not None]
    return torch.stack(found) if len(found) == len(mems) else None


def _nothing(layer: Layer, flow: Tensor) -> Tensor:
    # T = 0: only the shape of a step's output is wanted, and asking for it may change nothing
    twin = Layer(layer.name, copy.deepcopy(layer.module), layer.adapter, stateful=layer.stateful)
    with torch.no_grad():
        out = _step(twin, flow.new_zeros(flow.shape[1:]), None)[0]
    return out.new_empty(0, *out.shape)
