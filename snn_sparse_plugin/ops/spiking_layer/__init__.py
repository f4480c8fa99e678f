"""The fused op: a synapse matrix and a layer of spiking neurons, over all time steps at once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...backends import select
from ...core import tally
from ...core.backend import LayerCall, LayerResult, calls
from ...core.config import current_config
from ...core.dynamics import PARAM_NAMES, NeuronParams, NeuronSpec, NeuronState
from ...core.equations import Equations
from ...core.errors import InputError, UnsupportedError
from ...core.spikes import SpikeTrain, as_spike_train, check_float, is_sparse_input
from ...core.surrogates import Surrogate
from . import autograd
from .library import spiking_layer_op
from .products import events_or_product, is_still

__all__ = ["SpikingLayerOutput", "spiking_layer"]


class SpikingLayerOutput(NamedTuple):
    """``spikes`` (T, B, N...) dense or SpikeTrain (the membrane for a readout), ``mem`` or None, final ``state``
    in the form it is given in (:class:`NeuronState`, or a dict with equations).

    ``active_fraction`` is the share of neuron-steps that pass a gradient.
    """

    spikes: Any
    mem: Tensor | None
    state: Any
    active_fraction: float


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
    name: str = "spiking_layer",
    **overrides: Any,
) -> SpikingLayerOutput:
    """Synapses and neurons of one layer over T steps, with the sparse surrogate gradient [Perez-Nieves & Goodman 2021].

    Args:
        x: input, (T, B, M) with ``weight``, the neurons' input current (T, B, N...) without. Dense, SpikeTrain,
            torch COO (T, B, M), torch CSR (T, B, M) or torch_sparse. float32 and float64; half precisions run on
            the reference backend.
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
        name: how error messages call this layer.
        **overrides: options of :class:`~snn_sparse_plugin.core.config.SparseConfig` for this call.

    Raises:
        InputError: shapes, dtypes or devices that do not fit, or non-finite values where they are seen.
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
    spec = spec or NeuronSpec()
    surrogate = surrogate or Surrogate("atan", (2.0,))
    if recurrent_weight is not None and not spec.spiking:
        raise InputError(f"{name}: a readout emits no spikes, so it takes no recurrent_weight.")
    train, dense = _input(x, weight, name)
    first = train if train is not None else dense
    assert first is not None
    dtype, device, (T, B) = first.dtype, first.device, first.shape[:2]
    features = _features(first, weight, spec, name)
    if steps is not None:
        if T != 1 or steps < 1:
            raise InputError(
                f"{name}: steps={steps} says how often an input of one step (1, B, ...) comes, "
                f"got {tuple(first.shape)}."
            )
        T, dense, train = steps, first.to_dense() if isinstance(first, SpikeTrain) else first, None
    elif dense is not None and is_still(dense):
        dense = dense[:1]
    N = math.prod(features)
    _check_tensors(
        name, dtype, device, (_inputs_of(spec) * N, N), weight, bias, recurrent_weight, recurrent_bias
    )
    names: tuple[str, ...] = PARAM_NAMES
    values = list(params) if isinstance(params, NeuronParams) else []
    if isinstance(spec, Equations):
        names, values = spec.program.params, _by_name(params, spec, name)
    packed = _pack_params(names, values, features, dtype, device, name)
    recurrent = recurrent_weight is not None
    if recurrent and isinstance(spec, Equations) and not spec.program.recurrent:
        raise InputError(
            f"{name}: these equations never read a recurrent current, so they take no recurrent_weight."
        )
    v0, i0, s0 = _pack_state(state, spec, recurrent, (B, *features), dtype, device, name)
    rec0 = None
    if recurrent_weight is not None:
        rec0 = F.linear(s0.to(dtype), recurrent_weight, recurrent_bias)  # type: ignore[union-attr]
    if torch.compiler.is_compiling():
        if events or dense is None:
            raise UnsupportedError(f"{name}: inside torch.compile the op takes and returns dense tensors.")
        if isinstance(spec, Equations):
            raise UnsupportedError(f"{name}: a neuron given by equations cannot enter a compiled graph.")
        if surrogate.kind == "custom":
            raise UnsupportedError(f"{name}: a custom surrogate function cannot enter a compiled graph.")
        flat = dense if len(dense) == T else dense.expand(T, *dense.shape[1:])
        flat = flat if weight is not None else flat.reshape(T, B, N)
        inputs = (flat, weight, bias, recurrent_weight, recurrent_bias, rec0, v0, i0, packed)
        node, membrane, v, i = spiking_layer_op(inputs, spec, surrogate, overrides)
        mem = membrane if return_mem else None
        return _output(spec, node, mem, v, i, s0, (T, B), features, math.nan)

    config = current_config().updated(**overrides) if overrides else current_config()
    if config.check:
        _check_finite(name, input=dense, weight=weight, bias=bias, recurrent_weight=recurrent_weight)
    chosen = select(
        config.backend,
        "spiking_layer",
        device=device,
        dtype=dtype,
        spec=spec,
        surrogate=surrogate,
        recurrent=recurrent,
    )

    current: Tensor | None = None
    if train is not None and 0 in (*train.shape, N):
        dense, train = train.to_dense(), None
    if weight is not None and train is None:
        assert dense is not None
        if len(dense) == T:
            train, current = events_or_product(dense, weight, bias)
        else:
            current = F.linear(dense, weight, bias)
    elif weight is None:
        whole = train.to_dense() if train is not None else dense
        assert whole is not None
        current = whole.reshape(len(whole), B, _inputs_of(spec) * N)
        train = None
    if train is not None:
        train = train.flatten()
    leaves = [current, recurrent_weight, recurrent_bias, rec0, v0, i0, packed]
    if train is not None:
        leaves += [train.carrier, weight, bias]
    needs_grad = torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in leaves)
    call = LayerCall(
        spec=spec,
        surrogate=surrogate,
        threshold=surrogate.resolve(config.backprop_threshold),
        min_active=config.min_active,
        T=T,
        B=B,
        N=N,
        train=train,
        current=current,
        weight=weight if train is not None else None,
        bias=bias if train is not None else None,
        rec_weight=recurrent_weight,
        rec_bias=recurrent_bias,
        rec0=rec0,
        v0=v0,
        i0=i0,
        params=packed,
        want_spikes=spec.spiking and not events,
        want_events=spec.spiking and (events or recurrent_weight is not None),
        want_mem=return_mem or not spec.spiking,
        needs_grad=needs_grad,
        params_grad=packed.requires_grad,
        name=name,
    )
    result, carrier = autograd.apply(call, chosen)
    ran = tally.current()
    ran.count("fused")
    if result.saved is not None and result.saved.threshold is None and call.threshold is not None:
        calls["guard", name] += 1  # min_active made this call exact
        ran.count("guard")
    spikes: Any = result.spikes
    if not spec.spiking:
        spikes = result.mem
    elif events:
        assert result.events is not None
        active = result.saved.active if result.saved is not None else None
        spikes = SpikeTrain(
            *result.events, (T, B, N), dtype=dtype, carrier=carrier, active=active, check=False
        )
    if spec.spiking:
        tally.show(spikes, _passing(call, result), T)
    mem = result.mem if return_mem else None
    return _output(spec, spikes, mem, result.v, result.i, s0, (T, B), features, result.active_fraction)


def _passing(call: LayerCall, result: LayerResult) -> float:
    """The share of neuron-steps that pass a gradient; NaN where none was asked for."""
    if result.saved is None or call.surrogate.kind == "zero":
        return math.nan
    return 1.0 if result.saved.threshold is None else result.active_fraction


def _output(
    spec: NeuronSpec | Equations,
    spikes: Any,
    mem: Tensor | None,
    v: Tensor,
    i: Tensor | None,
    s0: Tensor | None,
    steps: tuple[int, ...],
    features: tuple[int, ...],
    active_fraction: float,
) -> SpikingLayerOutput:
    B = steps[1]
    last = None
    if s0 is not None:
        if not steps[0]:
            assert s0 is not None
            last = s0
        else:
            last = spikes.step(-1) if isinstance(spikes, SpikeTrain) else spikes[-1]
        last = last.view(B, *features)
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


def _input(x: Any, weight: Tensor | None, name: str) -> tuple[SpikeTrain | None, Tensor | None]:
    if is_sparse_input(x):
        train = as_spike_train(x)
        shape, dense = train.shape, None
    elif isinstance(x, Tensor):
        check_float(x, f"{name}: input")
        train, shape, dense = None, x.shape, x
    else:
        raise InputError(f"{name}: input must be a tensor or a SpikeTrain, got {type(x).__name__}.")
    if len(shape) < 3:
        raise InputError(f"{name}: input must have shape (T, B, N...), got {tuple(shape)}.")
    if weight is not None:
        if weight.dim() != 2:
            raise InputError(f"{name}: weight must be (N, M), got {tuple(weight.shape)}.")
        if len(shape) != 3 or shape[2] != weight.shape[1]:
            raise InputError(
                f"{name}: input has shape {tuple(shape)}, weight expects (T, B, {weight.shape[1]}). "
                f"Check the number of features of the encoder or of the layer below."
            )
    return train, dense


def _inputs_of(spec: NeuronSpec | Equations) -> int:
    """C: how many input currents a neuron has."""
    return len(spec.inputs) if isinstance(spec, Equations) else 1


def _features(
    first: Tensor | SpikeTrain, weight: Tensor | None, spec: NeuronSpec | Equations, name: str
) -> tuple[int, ...]:
    """The shape of the neurons, N..."""
    found = (weight.shape[0],) if weight is not None else tuple(first.shape[2:])
    count = _inputs_of(spec)
    if count == 1:
        return found
    if weight is None and len(found) > 1 and found[0] == count:
        return found[1:]
    if len(found) == 1 and found[0] % count == 0:
        return (found[0] // count,)
    what = "current" if weight is None else "weight"
    raise InputError(
        f"{name}: a neuron with {count} inputs takes a {what} of {count}·N features, the neurons of the first input "
        f"first, got {found}."
    )


def _check_tensors(
    name: str,
    dtype: torch.dtype,
    device: torch.device,
    sizes: tuple[int, int],
    *tensors: Tensor | None,
) -> None:
    labels = ("weight", "bias", "recurrent_weight", "recurrent_bias")
    currents, neurons = sizes
    shapes = (None, (currents,), (currents, neurons), (currents,))
    for label, shape, tensor in zip(labels, shapes, tensors, strict=True):
        if tensor is None:
            continue
        if tensor.dtype != dtype:
            raise InputError(f"{name}: {label} is {tensor.dtype}, the input {dtype}; convert one of them.")
        if tensor.device != device:
            raise InputError(f"{name}: {label} is on {tensor.device}, the input on {device}.")
        if shape is not None and tuple(tensor.shape) != shape:
            raise InputError(f"{name}: {label} has shape {tuple(tensor.shape)}, expected {shape}.")


def _check_finite(name: str, **tensors: Tensor | None) -> None:
    for label, tensor in tensors.items():
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            raise InputError(f"{name}: {label} has NaN or infinite values.")


def _by_name(params: Any, spec: Equations, name: str) -> list[Tensor | float]:
    """The parameters of equations in the program's order."""
    known = spec.program.params
    if not isinstance(params, Mapping) or set(params) != set(known):
        given = sorted(params) if isinstance(params, Mapping) else type(params).__name__
        raise InputError(f"{name}: these equations take params {sorted(known)}, got {given}.")
    return [params[label] for label in known]


def _pack_params(
    names: Sequence[str],
    values: Sequence[Tensor | float],
    features: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    name: str,
) -> Tensor:
    """(P, N): one row a parameter. 0-dim tensors may stay on the CPU, as Norse's do."""
    rows = []
    N = math.prod(features)
    eager = device.type == "cpu" and not torch.compiler.is_compiling()
    if values and eager and all(map(_is_number, values)):
        numbers = torch.tensor([float(value) for value in values], dtype=dtype)
        return numbers.unsqueeze(1).expand(-1, N).contiguous()
    for label, value in zip(names, values, strict=True):
        if not isinstance(value, Tensor):
            rows.append(torch.full((N,), float(value), dtype=dtype, device=device))
            continue
        if value.dim() and value.device != device:
            raise InputError(f"{name}: parameter {label!r} is on {value.device}, the input on {device}.")
        try:
            row = value.to(device=device, dtype=dtype).expand(features)
        except RuntimeError as error:
            raise InputError(
                f"{name}: parameter {label!r} of shape {tuple(value.shape)} does not broadcast to the neurons "
                f"{features}."
            ) from error
        rows.append(row.reshape(N))
    return torch.stack(rows) if rows else torch.empty(0, N, dtype=dtype, device=device)


def _is_number(value: Any) -> bool:
    """Whether a parameter is one number for all neurons, without a gradient."""
    return not isinstance(value, Tensor) or (
        not value.dim() and not value.requires_grad and value.device.type == "cpu"
    )


def _pack_state(
    state: Any,
    spec: NeuronSpec | Equations,
    recurrent: bool,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    name: str,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(v0, i0, last spikes), each (B, N); with equations v0 is all states, (K, B, N)."""
    flat = (shape[0], math.prod(shape[1:]))

    def one(label: str, value: Tensor | None) -> Tensor:
        if value is None:
            return torch.zeros(flat, dtype=dtype, device=device)
        if value.device != device and value.dim():
            raise InputError(f"{name}: state {label!r} is on {value.device}, the input on {device}.")
        if torch.promote_types(value.dtype, dtype) != dtype:
            raise InputError(
                f"{name}: state {label!r} is {value.dtype}, the input {dtype}; convert one of them."
            )
        try:
            return value.to(device=device, dtype=dtype).expand(shape).reshape(flat).contiguous()
        except RuntimeError as error:
            raise InputError(
                f"{name}: state {label!r} has shape {tuple(value.shape)}, expected {shape}."
            ) from error

    if isinstance(spec, Equations):
        given = dict(state or {})
        unknown = set(given) - {*spec.states, "spikes"}
        if unknown:
            raise InputError(
                f"{name}: no state {sorted(unknown)} in these equations, only {list(spec.states)}."
            )
        states = torch.stack([one(label, given.get(label)) for label in spec.states])
        return states, None, one("spikes", given.get("spikes")) if recurrent else None
    state = state or NeuronState()
    return (
        one("v", state.v),
        one("i", state.i) if spec.synapse else None,
        one("spikes", state.spikes) if recurrent else None,
    )
