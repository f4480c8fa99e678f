"""One neuron over all steps, with the linear layer before it, as one call of the op; and when that cannot be."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from numpy import broadcast_shapes
from torch import Tensor, nn

from ..adapters import Adapter, Neuron, config_of, refuse, running
from ..core.config import SparseConfig, current_config
from ..core.dynamics import NeuronState
from ..core.once import made_once
from ..core.precision import any_autocast, cast, state_dtype, without_autocast
from ..core.spikes import SpikeTrain
from ..ops.spiking_layer.inputs import Synapses as AllSynapses
from ..ops.spiking_layer.prepared import (
    Asked,
    Prepared,
    SpikingLayerOutput,
    form_of,
    keep,
    like,
    prepare,
    recall,
)
from .precision import Dtypes, factor, matters, of_layer
from .stepping import Flow, Layer, Passed, check_features

# a one-to-one recurrence runs as a diagonal matrix: beyond this many neurons it is stepped instead
MAX_DIAGONAL = 1024

# events of a layer, or words of them, that may be kept until somebody asks for a step of them
KEPT_EVENTS = 1 << 16

# why a neuron is not fused
_PER_NEURON = "a parameter that is not one number for each neuron"
_HIGHER = "a state or parameter of a higher precision than the input"
_WIDER = "a state of more samples or neurons than the input"


class Synapses(NamedTuple):
    """``weight`` (N, M) and ``bias`` (N,) between an input and a neuron."""

    weight: Tensor
    bias: Tensor | None


def takes_step(neuron: Neuron, x: Tensor, state: list[Tensor]) -> torch.Size | str:
    """The shape of a step's output if steps on inputs like ``x`` can run as one call, else why not."""
    shape, dtype, device = x.shape, x.dtype, x.device
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
    if any(w.device != device for w in present) or (
        not any_autocast() and any(w.dtype != dtype for w in present)
    ):
        return "weights of another dtype than the input, or on another device"
    if neuron.recurrent and _recurrent_weight(neuron, features) is None:
        return _no_recurrence(features)
    template = template_of((*batch, *features), state_dtype(dtype), device)
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


_kept: dict[Any, Prepared] = {}


class Begun(NamedTuple):
    """A call that has been prepared, and what it is given."""

    ready: Prepared
    flow: Flow
    synapses: AllSynapses
    start: Any  # the state before the first step, in the op's form
    initial: Any  # and in the library's
    half: Dtypes | None
    want_mem: bool
    wants_before: bool


@dataclass
class FusedCall:
    """A neuron, what it stands behind, and how its call is asked for."""

    layer: Layer
    neuron: Neuron
    linear: nn.Linear | Synapses | None
    name: str
    state: Any
    per_step: bool
    last: bool = False
    config: SparseConfig | None = None  # of the call; None: what holds for the module now
    steps: int | None = None  # of a flow (1, B, ...) that is the same at every step
    half: Dtypes | None = (
        None  # what upstream gives where half precision comes in; None: look where it matters
    )
    ready: Prepared | None = None  # once it has run

    @property
    def adapter(self) -> Adapter:
        assert self.layer.adapter is not None
        return self.layer.adapter

    def run(self, flow: Flow, events: bool, want_mem: bool) -> Passed | None:
        """One call of the op; None where only upstream's own step does what upstream does."""
        begun = self.begin(flow, events, want_mem)
        if begun is None:
            return None
        with running(self.layer.module), without_autocast():
            out = begun.ready.run(begun.flow, begun.synapses, self.neuron.params, begun.start)
        return self.end(begun, out)

    def begin(self, flow: Flow, events: bool, want_mem: bool) -> Begun | None:
        """What :meth:`run` gives to the op. No number of the flow is looked at, but where half precision comes in."""
        neuron, module, adapter, given = self.neuron, self.layer.module, self.adapter, flow.shape
        if len(given) < 3 or not adapter.takes_shape(module, given):
            return self._refused(f"an input of shape {tuple(given)}")
        weight, bias = neuron.input_weight, neuron.input_bias
        if self.linear is not None:
            weight, bias = self.linear.weight, self.linear.bias
        if weight is not None:
            check_features(self.name, given, weight.shape[1])
            if len(given) != 3:
                return self._refused(f"an input of shape {tuple(given)}, where (T, B, N) is fused")
        # in half precision torch's own product is taken: its rounding decides who spikes
        if self.linear is not None and matters(flow.dtype, True):
            flow, weight, bias = F.linear(dense(flow), self.linear.weight, self.linear.bias), None, None
        half = self.half
        if half is None and matters(flow.dtype, neuron.multiplies):
            half = of_layer(self.layer, flow, self.state, neuron.values, self.per_step)
        if half is not None and weight is not None:
            flow, weight, bias = F.linear(dense(flow), weight, bias), None, None
        T, B = self.steps or given[0], given[1]
        features = tuple(flow.shape[2:]) if weight is None else (weight.shape[0] // neuron.inputs,)
        if weight is None and neuron.inputs > 1:
            features = (flow.shape[2] // neuron.inputs,)
        recurrent = _recurrent_weight(neuron, features)
        if neuron.recurrent and recurrent is None:
            return self._refused(_no_recurrence(features))
        shape = (B, *features) if self.per_step else (T, B, *features)
        template = template_of(shape, state_dtype(flow.dtype), flow.device)
        start, initial = adapter.initial_state(module, neuron, template, self.state)
        config = self.config or config_of(module) or current_config()
        if self.last and config.min_active > 0:
            # the fraction that the guard looks at does not notice a single class that fell silent
            config = config.updated(min_active=1.0)
        wants_before = self.per_step and adapter.wants_membrane(neuron)
        as_events = events and neuron.spec.spiking and neuron.output is None and not any_autocast()
        _, kept_mem = adapter.keeps(module)
        asked = Asked(
            spec=neuron.spec,
            surrogate=neuron.surrogate,
            config=config,
            steps=self.steps,
            events=as_events,
            return_mem=want_mem or kept_mem is not None or wants_before,
            dtype=None if half is None else half.widest,
            name=self.name,
        )
        if neuron.recurrent_diagonal is None:
            recurrent = factor(recurrent)
        synapses = AllSynapses(weight, bias, recurrent, factor(neuron.recurrent_bias))
        ready = self._ready(asked, flow, synapses, start, template, features)
        if isinstance(ready, str):
            return self._refused(ready)
        self.ready = ready
        return Begun(ready, flow, synapses, start, initial, half, want_mem, wants_before)

    def end(self, begun: Begun, out: SpikingLayerOutput) -> Passed:
        """What :meth:`run` makes of what the op gave."""
        neuron, module, adapter = self.neuron, self.layer.module, self.adapter
        ready, flow, _, start, initial, half, want_mem, wants_before = begun
        T = ready.layout.T
        kept_output, kept_mem = adapter.keeps(module)
        spikes, mem, ended = out.spikes, out.mem, out.state
        if self.per_step and neuron.spec.spiking and T:
            note_last(adapter, module, out, start, T, wants_before)
        if neuron.spec.spiking and neuron.surrogate.kind == "zero":
            # upstream's spikes have no gradient then: parameters behind them get None, not zeros
            spikes = spikes.detach()
            if isinstance(ended, NeuronState) and ended.spikes is not None:
                ended = ended._replace(spikes=ended.spikes.detach())
            elif isinstance(ended, dict) and "spikes" in ended:
                ended = {**ended, "spikes": ended["spikes"].detach()}
        if neuron.output is not None:
            spikes = neuron.output(spikes, flow)  # of an input that is the same at every step, it broadcasts
        if half is not None:
            spikes, mem = half.of_output(spikes), cast(mem, half.mem or half.out)
        if kept_output is not None:
            setattr(module, kept_output, dense(spikes))
        if kept_mem is not None:
            setattr(module, kept_mem, mem)
        # a loop of no steps leaves each cell what it had; a sequence neuron makes its initial state even then
        moved = T > 0 or not self.per_step
        state = adapter.final_state(module, ended, initial) if moved else self.state
        if half is not None and moved:
            state = half.of_state(adapter, state)
        return Passed(spikes, mem if want_mem else None, state)

    def _ready(
        self,
        asked: Asked,
        flow: Flow,
        synapses: AllSynapses,
        start: Any,
        template: Tensor,
        features: tuple[int, ...],
    ) -> Prepared | str:
        """The prepared call of the op, or why the neuron is stepped; both follow from the form alone."""
        values = self.neuron.values
        states = list(start.values()) if isinstance(start, dict) else list(start)
        form = (*form_of(asked, flow, synapses), self.per_step, *map(like, values), *map(like, states))
        ready = recall(_kept, form)
        if ready is not None:
            return ready
        if not _per_neuron(values, features):
            return _PER_NEURON
        if not _same_dtype(template, states + values):
            return _HIGHER
        if _widens(states, (flow.shape[1], *features)):
            return _WIDER
        return keep(_kept, form, prepare(asked, flow, synapses))

    def _refused(self, why: str) -> Begun | None:
        refuse(self.layer.module, why)
        return None


@made_once(256)
def template_of(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Stands for an output of this form; nobody looks at its numbers."""
    return torch.empty((), dtype=dtype, device=device).expand(shape)


def _no_recurrence(features: tuple[int, ...]) -> str:
    if len(features) == 1:
        return f"a one-to-one recurrence of {features[0]} neurons, where up to {MAX_DIAGONAL} are fused"
    return f"a recurrence over features of shape {features}"


def note_last(adapter: Adapter, module: nn.Module, out: Any, start: Any, T: int, membrane: bool) -> None:
    """Tell the adapter what the last of T steps, from the state ``start``, began with."""
    if T == 1:
        before, after = (x.v if isinstance(x, NeuronState) else x.get("mem") for x in (start, out.state))
        if before is None and after is not None:  # no state yet, not even a shape
            before = torch.zeros_like(after)
        adapter.note_last(module, None, before)
    elif membrane:
        adapter.note_last(module, None, out.mem[-2].detach())
    else:
        spikes = out.spikes.detach()
        if isinstance(spikes, SpikeTrain) and sum(x.numel() for x in spikes.tensors()) <= KEPT_EVENTS:
            adapter.note_last(module, partial(spikes.values_at, T - 2), None)
        else:  # made now, as a step that keeps no others
            before = spikes.values_at(T - 2) if isinstance(spikes, SpikeTrain) else spikes[-2].clone()
            adapter.note_last(module, lambda: before, None)


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
            if broadcast_shapes(tensor.shape, shape) != shape:  # torch's imports its compiler
                return True
        except ValueError:  # fits nothing: the op says so
            continue
    return False


def dense(flow: Flow) -> Tensor:
    return flow.to_dense() if isinstance(flow, SpikeTrain) else flow
