"""Layers one after the other, each over all steps: Linear and neuron as one call of the fused op."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..adapters import Adapter, Neuron, config_of, has_hooks, refuse, running
from ..core.config import SparseConfig, current_config
from ..core.dynamics import NeuronState
from ..core.errors import InputError
from ..core.host import waits
from ..core.spikes import SpikeTrain
from ..ops import spiking_layer
from .modules import is_plain_linear, keeps_events
from .stepping import Flow, Layer, Passed, apply, check_features, loop

# a one-to-one recurrence runs as a diagonal matrix: beyond this many neurons it is stepped instead
MAX_DIAGONAL = 1024


def run(
    layers: list[Layer],
    x: Flow,
    states: list[Any],
    *,
    per_step: bool,
    events: bool = False,
    want_mem: bool = True,
) -> tuple[Flow, Tensor | None, list[Any]]:
    """All layers over all steps: -> (spikes, membrane of the last layer, one state per layer)."""
    if per_step and (not current_config().fuse_time or _shares_state(layers)):
        spikes, mem, states = loop(layers, _dense(x), states)
        return (_as_events(spikes, layers) if events else spikes), mem, states
    neurons = [_fusable(layer, per_step) for layer in layers]
    passed, index = Passed(x), 0
    while index < len(layers):
        linear = None
        if _joins_next(layers, neurons, index, passed.flow, per_step):
            linear = _linear(layers[index], per_step)
            index += 1
        layer, neuron, last = layers[index], neurons[index], index == len(layers) - 1
        found = None
        if neuron is not None:
            name = layer.label if linear is None else f"{layers[index - 1].name}→{layer.name}"
            call = FusedCall(layer, neuron, linear, name, states[index], per_step, last)
            as_events = events if last else _takes_events(layers, neurons, index + 1, per_step)
            found = call.run(passed.flow, as_events, want_mem and last)
            call.adapter.leave(layer.module)
        if found is None:
            flow = passed.flow
            if linear is not None:
                flow = apply(layers[index - 1], flow, None, per_step).flow
            found = apply(layer, flow, states[index], per_step, want_mem and last)
        passed, states[index] = found, found.state
        index += 1
    out = _as_events(passed.flow, layers) if events else _dense(passed.flow)
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


def _shares_state(layers: list[Layer]) -> bool:
    """Whether a neuron that keeps its state inside stands at two places: they take turns at every step."""
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


def _linear(layer: Layer, per_step: bool) -> nn.Linear | None:
    """The plain Linear of a layer, bare or inside a wrapper that applies it at every step."""
    module: nn.Module | None = layer.module
    if layer.wrapper is not None and not per_step and not has_hooks(layer.module):
        module = layer.wrapper.unwrap(layer.module)
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
    return not torch.is_autocast_enabled(flow.device.type)


def _takes_events(layers: list[Layer], neurons: list[Neuron | None], index: int, per_step: bool) -> bool:
    """Whether spikes that enter at ``index`` reach a weight matrix of the fused op as they are."""
    while index < len(layers) and neurons[index] is None and keeps_events(layers[index].module):
        index += 1
    if index >= len(layers):
        return False
    neuron = neurons[index]
    if neuron is not None:
        return neuron.input_weight is not None
    following = neurons[index + 1] if index + 1 < len(layers) else None
    joins = following is not None and following.input_weight is None
    return joins and _linear(layers[index], per_step) is not None


class Synapses(NamedTuple):
    """``weight`` (N, M) and ``bias`` (N,) between an input and a neuron."""

    weight: Tensor
    bias: Tensor | None


def takes_step(
    neuron: Neuron, shape: torch.Size, device: torch.device, state: list[Tensor]
) -> torch.Size | str:
    """The shape of a step's output if steps of float32 inputs of this shape can run as one call, else why not."""
    batch, features = (shape[:1], tuple(shape[1:])) if len(shape) > 1 else (torch.Size(), tuple(shape))
    if neuron.input_weight is not None:
        if len(features) != 1 or features[0] != neuron.input_weight.shape[1]:
            return f"an input of shape {tuple(shape)}"
        features = (neuron.input_weight.shape[0] // neuron.inputs,)
    elif neuron.inputs > 1:  # the one layer before it would have to be read as several
        return "a step loop of a neuron with several inputs"
    weights = (neuron.input_weight, neuron.input_bias, neuron.recurrent_weight, neuron.recurrent_bias)
    present = [w for w in weights if w is not None]
    if not shape.numel():
        return f"an empty input of shape {tuple(shape)}"
    if any(w.dtype != torch.float32 or w.device != device for w in present):
        return "weights of another dtype than float32, or on another device than the input"
    if neuron.recurrent and _recurrent_weight(neuron, features) is None:
        return _no_recurrence(features)
    template = torch.empty((), device=device).expand(*batch, *features)
    tensors = [t for t in (*state, *neuron.values) if isinstance(t, Tensor)]
    if any(t.dim() and t.device != device for t in tensors):
        return f"a state or parameter on another device than the input, which is on {device}"
    if not _per_neuron(neuron.values, features):
        return _PER_NEURON
    if not _same_dtype(template, tensors):
        return _HIGHER
    if _widens(list(state), tuple(template.shape)):
        return _WIDER
    return template.shape


@dataclass
class FusedCall:
    layer: Layer
    neuron: Neuron
    linear: nn.Linear | Synapses | None
    name: str
    state: Any
    per_step: bool
    last: bool = False
    config: SparseConfig | None = None  # of the call; None: what holds for the module now
    steps: int | None = None  # of a flow (1, B, ...) that is the same at every step

    @property
    def adapter(self) -> Adapter:
        assert self.layer.adapter is not None
        return self.layer.adapter

    def run(self, flow: Flow, events: bool, want_mem: bool) -> Passed | None:
        """One call of the op; None where only upstream's own step does what upstream does."""
        neuron, module, adapter = self.neuron, self.layer.module, self.adapter
        if len(flow.shape) < 3 or not adapter.takes_shape(module, flow.shape):
            return self._refused(f"an input of shape {tuple(flow.shape)}")
        weight, bias = neuron.input_weight, neuron.input_bias
        if self.linear is not None:
            weight, bias = self.linear.weight, self.linear.bias
        if weight is not None:
            check_features(self.name, flow.shape, weight.shape[1])
            if len(flow.shape) != 3:
                return self._refused(f"an input of shape {tuple(flow.shape)}, where (T, B, N) is fused")
        # the products with the weights have another dtype under autocast
        if torch.is_autocast_enabled(flow.device.type) and (weight is not None or neuron.recurrent):
            return self._refused("autocast, under which its products have another dtype")
        T, B = self.steps or len(flow), flow.shape[1]
        features = tuple(flow.shape[2:]) if weight is None else (weight.shape[0] // neuron.inputs,)
        if weight is None and neuron.inputs > 1:
            features = (flow.shape[2] // neuron.inputs,)
        recurrent = _recurrent_weight(neuron, features)
        if neuron.recurrent and recurrent is None:
            return self._refused(_no_recurrence(features))
        # half precisions mix with float32 states and spikes in ways that differ from library to library
        if flow.dtype not in (torch.float32, torch.float64):
            return self._refused(f"an input of {flow.dtype}, where float32 and float64 are fused")
        if not _per_neuron(neuron.values, features):
            return self._refused(_PER_NEURON)
        shape = (B, *features) if self.per_step else (T, B, *features)
        template = torch.empty((), dtype=flow.dtype, device=flow.device).expand(shape)
        start, initial = adapter.initial_state(module, neuron, template, self.state)
        states = list(start.values()) if isinstance(start, dict) else list(start)
        if not _same_dtype(template, states + neuron.values):
            return self._refused(_HIGHER)
        if _widens(states, (B, *features)):
            return self._refused(_WIDER)
        config = self.config or config_of(module)
        if self.last and config is not None and config.min_active > 0:
            # the fraction that the guard looks at does not notice a single class that fell silent
            config = config.updated(min_active=1.0)
        wants_before = self.per_step and adapter.wants_membrane(neuron)
        as_events = events and neuron.spec.spiking and neuron.output is None
        kept_output, kept_mem = adapter.keeps(module)
        with running(module):
            out = spiking_layer(
                flow,
                weight,
                bias,
                spec=neuron.spec,
                params=neuron.params,
                surrogate=neuron.surrogate,
                recurrent_weight=recurrent,
                recurrent_bias=neuron.recurrent_bias,
                state=start,
                steps=self.steps,
                events=as_events,
                return_mem=want_mem or kept_mem is not None or wants_before,
                name=self.name,
                **(vars(config) if config is not None else {}),
            )
        spikes, ended = out.spikes, out.state
        if self.per_step and neuron.spec.spiking and T:
            _note_last(adapter, module, out, start, T, wants_before)
        if neuron.spec.spiking and neuron.surrogate.kind == "zero":
            # upstream's spikes have no gradient then: parameters behind them get None, not zeros
            spikes = spikes.detach()
            if isinstance(ended, NeuronState) and ended.spikes is not None:
                ended = ended._replace(spikes=ended.spikes.detach())
            elif isinstance(ended, dict) and "spikes" in ended:
                ended = {**ended, "spikes": ended["spikes"].detach()}
        if neuron.output is not None:
            spikes = neuron.output(spikes, flow)  # of an input that is the same at every step, it broadcasts
        if kept_output is not None:
            setattr(module, kept_output, _dense(spikes))
        if kept_mem is not None:
            setattr(module, kept_mem, out.mem)
        # a loop of no steps leaves each cell what it had; a sequence neuron makes its initial state even then
        moved = T > 0 or not self.per_step
        state = adapter.final_state(module, ended, initial) if moved else self.state
        return Passed(spikes, out.mem if want_mem else None, state)

    def _refused(self, why: str) -> Passed | None:
        refuse(self.layer.module, why)
        return None


_PER_NEURON = "a parameter that is not one number for each neuron"
_HIGHER = "a state or parameter of a higher precision than the input"
_WIDER = "a state of more samples or neurons than the input"


def _no_recurrence(features: tuple[int, ...]) -> str:
    if len(features) == 1:
        return f"a one-to-one recurrence of {features[0]} neurons, where up to {MAX_DIAGONAL} are fused"
    return f"a recurrence over features of shape {features}"


def _note_last(adapter: Adapter, module: nn.Module, out: Any, start: Any, T: int, membrane: bool) -> None:
    if T == 1:
        before, after = (x.v if isinstance(x, NeuronState) else x.get("mem") for x in (start, out.state))
        if before is None and after is not None:  # no state yet, not even a shape
            before = torch.zeros_like(after)
        adapter.note_last(module, None, before)
    elif membrane:
        adapter.note_last(module, None, out.mem[-2].detach())
    else:
        spikes = out.spikes.detach()
        adapter.note_last(
            module, spikes.step(-2) if isinstance(spikes, SpikeTrain) else spikes[-2].clone(), None
        )


def _recurrent_weight(neuron: Neuron, features: tuple[int, ...]) -> Tensor | None:
    if neuron.recurrent_diagonal is not None:
        diagonal = neuron.recurrent_diagonal.expand(features).reshape(-1)
        return diagonal.diag_embed() if diagonal.numel() <= MAX_DIAGONAL else None
    return neuron.recurrent_weight if len(features) == 1 else None


def _per_neuron(params: list[Any], features: tuple[int, ...]) -> bool:
    # upstream also takes a parameter per sample, and has its own words for one that fits nothing
    shapes = [p.shape for p in params if isinstance(p, Tensor) and p.dim()]
    return all(
        len(shape) <= len(features)
        and all(n in (1, N) for n, N in zip(reversed(shape), reversed(features), strict=False))
        for shape in shapes
    )


def _same_dtype(template: Tensor, tensors: list[Any]) -> bool:
    # a state or parameter of higher precision would promote upstream's membrane
    present = [t for t in tensors if isinstance(t, Tensor)]
    dtype = template.dtype
    return all(t.dtype is dtype or torch.result_type(template, t) == dtype for t in present)


def _widens(state: list[Any], shape: tuple[int, ...]) -> bool:
    # upstream broadcasts an input to a state of more neurons or samples
    for tensor in state:
        try:
            if tensor is None or tensor.shape == shape:
                continue
            if torch.broadcast_shapes(tensor.shape, shape) != shape:
                return True
        except RuntimeError:  # fits nothing: the op says so
            continue
    return False


def _dense(flow: Flow) -> Tensor:
    return flow.to_dense() if isinstance(flow, SpikeTrain) else flow


def _as_events(flow: Flow, layers: list[Layer]) -> SpikeTrain:
    if isinstance(flow, SpikeTrain):
        return flow
    last = layers[-1]
    neuron = None if last.adapter is None else last.adapter.neuron(last.module)
    if neuron is None or (isinstance(neuron, Neuron) and not neuron.spec.spiking):
        raise InputError(f"events=True wants spikes, but the last layer {last.label} emits none.")
    binary = isinstance(neuron, Neuron) and neuron.output is None
    train = SpikeTrain.from_dense(flow, binary=binary and waits(flow))
    return train._replace(carrier=flow.flatten(2)) if flow.requires_grad else train
