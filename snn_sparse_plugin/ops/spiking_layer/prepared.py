"""Prepared calls: what the op decides before it looks at a number, kept for all calls of the same form.

The form of a call is everything that its checks and choices depend on: shapes, dtypes and devices, the neuron and the
options. What is kept depends on nothing else and holds no tensor, so that nothing can make it wrong: another option, or
a module that was moved, is another form, and numbers, gradients and states are looked at in every call.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...backends import select
from ...core import registry, tally
from ...core.backend import Backend, LayerCall, LayerResult, calls, enough, events_of
from ...core.config import SparseConfig
from ...core.dynamics import NeuronSpec, NeuronState
from ...core.equations import Equations
from ...core.precision import HALF, cast, state_dtype
from ...core.spikes import SpikeTrain
from ...core.surrogates import Surrogate
from . import autograd
from .autograd import Link
from .inputs import Given, Layout, Synapses, check_finite, given, inputs_of, layout_of, widened
from .products import are_few, how_to_multiply


class SpikingLayerOutput(NamedTuple):
    """``spikes`` (T, B, N...) dense or SpikeTrain (the membrane for a readout), ``mem`` or None, final ``state``
    in the form it is given in (:class:`NeuronState`, or a dict with equations).

    ``active_fraction`` is the share of neuron-steps inside the window that pass a gradient: a number, or a 0-dim
    tensor where a device counts them, which nothing waits for until you read it.
    """

    spikes: Any
    mem: Tensor | None
    state: Any
    active_fraction: float | Tensor


class Asked(NamedTuple):
    """A call of the op but for its tensors, as :func:`~snn_sparse_plugin.ops.spiking_layer` takes it."""

    spec: NeuronSpec | Equations
    surrogate: Surrogate
    config: SparseConfig
    steps: int | None
    events: bool
    return_mem: bool
    dtype: torch.dtype | None
    name: str


Form = tuple[Any, ...]


def form_of(asked: Asked, x: Tensor | SpikeTrain, synapses: Synapses) -> Form:
    """What all decisions about a call depend on."""
    weight, bias, recurrent, recurrent_bias = synapses
    return (
        *(asked, registry.generation(), type(x), x.shape, x.dtype, x.device),
        *(like(weight), like(bias), like(recurrent), like(recurrent_bias)),
    )


def like(x: Any) -> Any:
    """Shape, dtype and device of a tensor; None for what is none."""
    return (x.shape, x.dtype, x.device) if isinstance(x, Tensor) else None


@dataclass(frozen=True)
class Prepared:
    """A call of the op that has been checked, for any numbers."""

    asked: Asked
    layout: Layout
    backend: Backend
    pattern: LayerCall  # without its tensors
    wanted: torch.dtype  # of spikes and membranes
    wide: bool  # half precision, which the backend wants widened

    def run(self, x: Tensor | SpikeTrain, synapses: Synapses, params: Any, state: Any) -> SpikingLayerOutput:
        """The call with these numbers, which have the form that it was prepared for."""
        return run_chain(x, [Step(self, synapses, params, state, tally.current())])[0]

    def checked(self, call: Given) -> Given:
        """The call in the precision that the backend computes in."""
        if self.asked.config.check:
            check_finite(call)
        return widened(call) if self.wide else call

    def described(self, call: Given, before: LayerCall | None = None) -> LayerCall:
        """The call as a backend gets it: events or a dense input with their weights, or currents; without an input
        where that is what the call ``before`` will have emitted."""
        synapses, v0, i0, packed = call.synapses, call.v0, call.i0, call.params
        train = dense = current = None
        if before is None:
            train, dense, current = _input(call, self.backend.takes_dense)
        weight, bias = (synapses.weight, synapses.bias) if current is None else (None, None)
        leaves = (synapses.recurrent, synapses.recurrent_bias, call.rec0, v0, i0, packed, current, dense)
        carrier = None if train is None else train.carrier
        learns = torch.is_grad_enabled() and (
            (before is not None and before.needs_grad)
            or any(x is not None and x.requires_grad for x in (weight, bias, carrier, *leaves))
        )
        return self.pattern.changed(
            train=train,
            dense=dense,
            current=current,
            weight=weight,
            bias=bias,
            rec_weight=synapses.recurrent,
            rec_bias=synapses.recurrent_bias,
            rec0=call.rec0,
            v0=v0,
            i0=i0,
            params=packed,
            needs_grad=learns,
            params_grad=packed.requires_grad,
        )

    def output(
        self, call: Given, link: Link, result: LayerResult, carrier: Tensor | None
    ) -> SpikingLayerOutput:
        """What the user gets."""
        _count(link, result)
        return rounded(_wrap(call, link.call, result, carrier, self.asked.return_mem), self.wanted)

    def between(
        self, call: Given, link: Link, result: LayerResult, emitted: SpikeTrain | None
    ) -> SpikingLayerOutput:
        """What is known of a layer whose events another one took."""
        _count(link, result)
        return output(call, emitted, None, result.v, result.i, result.active_fraction)


class Step(NamedTuple):
    """A layer of a chain: its call and the numbers of it, but for the input."""

    ready: Prepared
    synapses: Synapses
    params: Any
    state: Any
    ran: tally.Record


def run_chain(x: Tensor | SpikeTrain, steps: Sequence[Step], shown: bool = False) -> list[SpikingLayerOutput]:
    """Layers of which each takes the events of the one before, prepared to emit them, as one node of the graph.
    ``shown``: the spikes of all have a gradient, not of the last alone."""
    calls: list[Given] = []
    links: list[Link] = []
    for ready, synapses, params, state, ran in steps:
        entering, before = (None, links[-1].call) if links else (x, None)
        call = ready.checked(given(ready.layout, entering, synapses, params, state))
        calls.append(call)
        last = len(calls) == len(steps)
        links.append(Link(ready.described(call, before), ready.backend, ran, shown or last))
    results, carriers = autograd.apply_chain(links)
    outs = []
    for k in range(len(links) - 1):
        emitted = links[k + 1].call.train
        if carriers[k] is not None and emitted is not None:
            emitted = emitted._replace(carrier=carriers[k])
        outs.append(steps[k].ready.between(calls[k], links[k], results[k], emitted))
    return [*outs, steps[-1].ready.output(calls[-1], links[-1], results[-1], carriers[-1])]


_kept: dict[Form, Prepared] = {}
_MOST = 512  # forms that are kept


def prepare(asked: Asked, x: Tensor | SpikeTrain, synapses: Synapses) -> Prepared:
    """The prepared call for arguments like these.

    Raises:
        InputError: shapes, dtypes or devices that do not fit.
        UnsupportedError: the backend asked for by name cannot run it.
    """
    form = form_of(asked, x, synapses)
    found = recall(_kept, form)
    return keep(_kept, form, _made(asked, x, synapses)) if found is None else found


def recall(kept: dict[Any, Prepared], form: Any) -> Prepared | None:
    """What is kept for a form."""
    try:
        return kept.get(form)
    except TypeError:  # a user's spike function that cannot be hashed
        return None


def keep(kept: dict[Any, Prepared], form: Any, found: Prepared) -> Prepared:
    """Keep a prepared call for a form that can be hashed."""
    if len(kept) >= _MOST:  # those in use come back at once
        kept.clear()
    with suppress(TypeError):
        kept[form] = found
    return found


def _made(asked: Asked, x: Tensor | SpikeTrain, synapses: Synapses) -> Prepared:
    spec, surrogate, config = asked[:3]
    layout = layout_of(x, synapses, spec, surrogate, asked.steps, asked.name)
    precise, device = state_dtype(layout.dtype), layout.device
    backend = select(
        config.backend,
        "spiking_layer",
        device=device,
        dtype=precise,
        spec=spec,
        surrogate=surrogate,
        recurrent=layout.recurrent,
    )
    wanted = layout.dtype if asked.dtype is None else asked.dtype
    nothing: Any = None
    pattern = LayerCall(
        spec=spec,
        surrogate=surrogate,
        threshold=surrogate.resolve(config.backprop_threshold),
        min_active=config.min_active,
        T=layout.T,
        B=layout.B,
        N=layout.N,
        train=None,
        current=None,
        weight=None,
        bias=None,
        rec_weight=None,
        rec_bias=None,
        rec0=None,
        v0=nothing,
        i0=None,
        params=nothing,
        want_spikes=spec.spiking and not asked.events,
        want_events=spec.spiking and (asked.events or layout.recurrent),
        want_mem=asked.return_mem or not spec.spiking,
        name=asked.name,
        out_dtype=wanted if wanted in HALF and backend.takes_half(device, wanted) else None,
    )
    wide = layout.dtype in HALF and not backend.takes_half(device, layout.dtype)
    return Prepared(asked, layout, backend, pattern, wanted, wide)


def _input(call: Given, takes_dense: bool) -> tuple[SpikeTrain | None, Tensor | None, Tensor | None]:
    """Events or a dense input (T, B, M) for a backend to multiply with the weight, or the current (T or 1, B, C·N)."""
    train, dense, weight = call.train, call.dense, call.synapses.weight
    if train is not None and 0 in (*train.shape, call.N):
        dense, train = train.to_dense(), None
    current: Tensor | None = None
    if weight is None:
        whole = train.to_dense() if train is not None else dense
        assert whole is not None
        return None, None, whole.reshape(len(whole), call.B, inputs_of(call.spec) * call.N)
    if train is None:
        assert dense is not None
        if dense.shape[0] == call.T and not are_few(dense):
            return how_to_multiply(dense, weight, call.synapses.bias, takes_dense)
        current = F.linear(dense, weight, call.synapses.bias)
    return None if train is None else train.flatten(), None, current


def _count(link: Link, result: LayerResult) -> None:
    call, ran = link.call, link.ran
    ran.count_soon("fused")
    saved = result.saved
    if saved is None or call.threshold is None:
        return
    if saved.near is not None:
        if call.min_active > 0:
            ran.count_later(saved.near < enough(call), call.name, partial(_guarded, ran, call.name))
    elif saved.threshold is None:
        _guarded(ran, call.name, 1)


def _guarded(ran: tally.Record, name: str, n: int) -> None:
    """``min_active`` made n calls exact."""
    calls["guard", name] += n
    ran.count("guard", n)


def _wrap(
    call: Given, described: LayerCall, result: LayerResult, carrier: Tensor | None, return_mem: bool
) -> SpikingLayerOutput:
    """What the user gets of a backend's result."""
    spikes: Any = result.spikes if call.spec.spiking else result.mem
    if call.spec.spiking and not described.want_spikes:
        active = result.saved.active if result.saved is not None else None
        spikes = events_of(result, (call.T, call.B, call.N), call.state_dtype, carrier, active)
    if call.spec.spiking and tally.watchers.get() is not None:
        tally.show(spikes, _passing(described, result), call.T)
    mem = result.mem if return_mem else None
    return output(call, spikes, mem, result.v, result.i, result.active_fraction)


def _passing(call: LayerCall, result: LayerResult) -> float | Tensor:
    """The share of neuron-steps that pass a gradient; NaN where none was asked for."""
    saved, share = result.saved, result.active_fraction
    if saved is None or call.surrogate.kind == "zero":
        return math.nan
    if saved.near is not None:
        return torch.where(saved.near < enough(call), 1.0, share)
    return 1.0 if saved.threshold is None else share


def output(
    call: Given, spikes: Any, mem: Tensor | None, v: Tensor, i: Tensor | None, active_fraction: float | Tensor
) -> SpikingLayerOutput:
    spec, features, B = call.spec, call.features, call.B
    steps = (call.T, B)
    last = call.spikes0
    if last is not None:
        if call.T:
            last = spikes.step(-1) if isinstance(spikes, SpikeTrain) else spikes[-1]
        last = last.view(B, *features)  # type: ignore[union-attr]
    if isinstance(spikes, SpikeTrain):
        spikes = spikes.view(*features)
    elif len(features) > 1:
        spikes = spikes.view(*steps, *features)
    state: Any
    if isinstance(spec, Equations):
        state = {
            label: value.view(B, *features) for label, value in zip(spec.states, v.unbind(0), strict=True)
        }
        if last is not None:
            state["spikes"] = last
    else:
        if len(features) > 1:  # a view of the same shape would have to be copied to be owned
            v, i = v.view(B, *features), None if i is None else i.view(B, *features)
        state = NeuronState(v, i, last)
    if mem is not None and len(features) > 1:
        mem = mem.view(*steps, *features)
    return SpikingLayerOutput(spikes, mem, state, active_fraction)


def rounded(out: SpikingLayerOutput, dtype: torch.dtype) -> SpikingLayerOutput:
    spikes, mem = out.spikes, out.mem
    if spikes.dtype == dtype and (mem is None or mem.dtype == dtype):
        return out
    if spikes.dtype != dtype:
        spikes = spikes._replace(dtype=dtype) if isinstance(spikes, SpikeTrain) else spikes.to(dtype)
    return out._replace(spikes=spikes, mem=cast(mem, dtype))
