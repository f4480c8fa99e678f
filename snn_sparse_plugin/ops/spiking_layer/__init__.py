"""The fused op: a synapse matrix and a layer of spiking neurons, over all time steps at once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...backends import select
from ...core import tally
from ...core.backend import LayerCall, LayerResult, calls, enough
from ...core.config import SparseConfig, current_config
from ...core.dynamics import NeuronParams, NeuronSpec, NeuronState
from ...core.equations import Equations
from ...core.errors import UnsupportedError
from ...core.precision import HALF, cast, without_autocast
from ...core.spikes import SpikeTrain
from ...core.surrogates import Surrogate
from . import autograd
from .inputs import Given, Synapses, check_finite, given, inputs_of, widened
from .library import spiking_layer_op
from .products import events_of, how_to_multiply

__all__ = ["SpikingLayerOutput", "spiking_layer"]


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


def spiking_layer(
    x: Tensor | SpikeTrain | Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    spec: NeuronSpec | Equations | None = None,
    params: NeuronParams | Mapping[str, Tensor | float],
    surrogate: Surrogate | None = None,
    recurrent_weight: Tensor | None = None,
    recurrent_bias: Tensor | None = None,
    state: NeuronState | Mapping[str, Tensor | None] | None = None,
    steps: int | None = None,
    events: bool = False,
    return_mem: bool = False,
    dtype: torch.dtype | None = None,
    name: str = "spiking_layer",
    **overrides: Any,
) -> SpikingLayerOutput:
    """Synapses and neurons of one layer over T steps, with the sparse surrogate gradient [Perez-Nieves & Goodman 2021].

    Args:
        x: input, (T, B, M) with ``weight``, the neurons' input current (T, B, N...) without. Dense, SpikeTrain,
            torch COO (T, B, M), torch CSR (T, B, M) or torch_sparse. In float16 and bfloat16 the neurons compute in
            float32, and what leaves is rounded.
        weight: (N, M), as of ``nn.Linear``. ``bias``: (N,). For equations with C > 1 inputs every N in the shape of a
            weight, bias or current is C·N, the neurons of the first input first; a current may be (T, B, C, N...).
        spec: which neuron: a member of the canonical family, or :class:`~snn_sparse_plugin.core.equations.Equations`;
            default is snnTorch's Leaky.
        params: decays, thresholds: scalars or per neuron, tensors may require a gradient; with equations a dict by
            name.
        surrogate: default is snnTorch's ``atan(2)``.
        recurrent_weight: (N, N), ``recurrent_bias`` (N,): fed with the layer's spikes of the previous step.
        state: initial state, each entry (B, N...); zeros where missing. With equations a dict by name, in which
            ``"spikes"`` are the last ones of a recurrent layer.
        steps: T, for an x (1, B, ...) that is the same at every step: it is multiplied once, and its gradient is the
            sum over the steps. An x of T steps that is ``expand``-ed from one and needs no gradient is recognised.
        events: return spikes as a :class:`~snn_sparse_plugin.core.spikes.SpikeTrain`.
        return_mem: also return the membrane after every step, (T, B, N...).
        dtype: of spikes and membranes; default is that of ``x``. The final state is float32 where x is half.
        name: how error messages call this layer.
        **overrides: options of :class:`~snn_sparse_plugin.core.config.SparseConfig` for this call.

    Raises:
        InputError: shapes, dtypes or devices that do not fit, or non-finite values where they are seen. On a GPU nobody
            looks at the numbers, unless with ``check=True``: a membrane there turns NaN as upstream's does.
        UnsupportedError: the backend asked for by name cannot do it.

    Example:
        >>> x = (torch.rand(20, 4, 30) < 0.05).float()
        >>> w = torch.randn(10, 30, requires_grad=True)
        >>> out = spiking_layer(x, w, params=NeuronParams(mem=0.9))
        >>> out.spikes.shape, out.state.v.shape
        (torch.Size([20, 4, 10]), torch.Size([4, 10]))
        >>> out.spikes.sum().backward(); w.grad.shape
        torch.Size([10, 30])
    """
    synapses = Synapses(weight, bias, recurrent_weight, recurrent_bias)
    spec, surrogate = spec or NeuronSpec(), surrogate or Surrogate("atan", (2.0,))
    with without_autocast():  # what is given says in which precision to compute
        call = given(x, synapses, spec, params, surrogate, state, steps, name)
        out = _run(call, overrides, events, return_mem)
    return _rounded(out, call.dtype if dtype is None else dtype)


def _run(call: Given, overrides: dict[str, Any], events: bool, return_mem: bool) -> SpikingLayerOutput:
    if torch.compiler.is_compiling():
        return _in_graph(call, overrides, events, return_mem)
    config = current_config().updated(**overrides) if overrides else current_config()
    if config.check:
        check_finite(call)
    backend = select(
        config.backend,
        "spiking_layer",
        device=call.device,
        dtype=call.state_dtype,
        spec=call.spec,
        surrogate=call.surrogate,
        recurrent=call.recurrent,
    )
    if call.dtype in HALF:
        call = widened(call)
    described = _describe(call, config, events, return_mem, backend.takes_dense)
    result, carrier = autograd.apply(described, backend)
    _count(described, result)
    return _wrap(call, described, result, carrier, return_mem)


def _rounded(out: SpikingLayerOutput, dtype: torch.dtype) -> SpikingLayerOutput:
    spikes, mem = out.spikes, out.mem
    if spikes.dtype != dtype:
        spikes = spikes._replace(dtype=dtype) if isinstance(spikes, SpikeTrain) else spikes.to(dtype)
    return out._replace(spikes=spikes, mem=cast(mem, dtype))


def _in_graph(call: Given, overrides: dict[str, Any], events: bool, return_mem: bool) -> SpikingLayerOutput:
    """The op as ``torch.compile`` sees it: one node."""
    call = widened(call) if call.dtype in HALF else call
    name, synapses, dense = call.name, call.synapses, call.dense
    if events or dense is None:
        raise UnsupportedError(f"{name}: inside torch.compile the op takes and returns dense tensors.")
    if isinstance(call.spec, Equations):
        raise UnsupportedError(f"{name}: a neuron given by equations cannot enter a compiled graph.")
    if call.surrogate.kind == "custom":
        raise UnsupportedError(f"{name}: a custom surrogate function cannot enter a compiled graph.")
    flat = dense if len(dense) == call.T else dense.expand(call.T, *dense.shape[1:])
    flat = flat if synapses.weight is not None else flat.reshape(call.T, call.B, call.N)
    inputs = (
        *(flat, synapses.weight, synapses.bias, synapses.recurrent, synapses.recurrent_bias),
        *(call.rec0, call.v0, call.i0, call.params),
    )
    node, membrane, v, i = spiking_layer_op(inputs, call.spec, call.surrogate, overrides)
    return _output(call, node, membrane if return_mem else None, v, i, math.nan)


def _describe(
    call: Given, config: SparseConfig, events: bool, return_mem: bool, takes_dense: bool
) -> LayerCall:
    """The call as a backend gets it: events or a dense input with their weights, or currents."""
    synapses, spec = call.synapses, call.spec
    train, dense, current = _input(call, takes_dense)
    weight, bias = (synapses.weight, synapses.bias) if current is None else (None, None)
    leaves = [synapses.recurrent, synapses.recurrent_bias, call.rec0, call.v0, call.i0, call.params]
    leaves += [current] if current is not None else [dense, weight, bias]
    if train is not None:
        leaves.append(train.carrier)
    return LayerCall(
        spec=spec,
        surrogate=call.surrogate,
        threshold=call.surrogate.resolve(config.backprop_threshold),
        min_active=config.min_active,
        T=call.T,
        B=call.B,
        N=call.N,
        train=train,
        dense=dense,
        current=current,
        weight=weight,
        bias=bias,
        rec_weight=synapses.recurrent,
        rec_bias=synapses.recurrent_bias,
        rec0=call.rec0,
        v0=call.v0,
        i0=call.i0,
        params=call.params,
        want_spikes=spec.spiking and not events,
        want_events=spec.spiking and (events or call.recurrent),
        want_mem=return_mem or not spec.spiking,
        needs_grad=torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in leaves),
        params_grad=call.params.requires_grad,
        name=call.name,
    )


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
        if len(dense) == call.T:
            return how_to_multiply(dense, weight, call.synapses.bias, takes_dense)
        current = F.linear(dense, weight, call.synapses.bias)
    return None if train is None else train.flatten(), None, current


def _count(call: LayerCall, result: LayerResult) -> None:
    ran = tally.current()
    ran.count("fused")
    saved = result.saved
    if saved is None or call.threshold is None:
        return
    guarded = partial(_guarded, ran, call.name)
    if saved.near is not None:
        if call.min_active > 0:
            ran.count_later(saved.near < enough(call), call.name, guarded)
    elif saved.threshold is None:
        guarded(1)


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
    return _output(call, spikes, mem, result.v, result.i, result.active_fraction)


def _passing(call: LayerCall, result: LayerResult) -> float | Tensor:
    """The share of neuron-steps that pass a gradient; NaN where none was asked for."""
    saved, share = result.saved, result.active_fraction
    if saved is None or call.surrogate.kind == "zero":
        return math.nan
    if saved.near is not None:
        return torch.where(saved.near < enough(call), 1.0, share)
    return 1.0 if saved.threshold is None else share


def _output(
    call: Given, spikes: Any, mem: Tensor | None, v: Tensor, i: Tensor | None, active_fraction: float | Tensor
) -> SpikingLayerOutput:
    spec, features, B = call.spec, call.features, call.B
    steps = (call.T, B)
    last = call.spikes0
    if last is not None:
        if call.T:
            last = spikes.step(-1) if isinstance(spikes, SpikeTrain) else spikes[-1]
        last = last.view(B, *features)  # type: ignore[union-attr]
    spikes = spikes.view(*features) if isinstance(spikes, SpikeTrain) else spikes.view(*steps, *features)
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
    return SpikingLayerOutput(
        spikes, None if mem is None else mem.view(*steps, *features), state, active_fraction
    )
