"""What the user gives the op, checked and in the form that backends take."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.dynamics import PARAM_NAMES, NeuronParams, NeuronSpec, NeuronState
from ...core.equations import Equations
from ...core.errors import InputError
from ...core.host import is_device, waits
from ...core.precision import cast, state_dtype
from ...core.spikes import SpikeTrain, check_float
from ...core.surrogates import Surrogate
from .products import is_still


class Synapses(NamedTuple):
    """The matrices of a layer: ``weight`` (C·N, M), ``bias`` (C·N,), ``recurrent`` (C·N, N), its bias (C·N,)."""

    weight: Tensor | None
    bias: Tensor | None
    recurrent: Tensor | None
    recurrent_bias: Tensor | None


@dataclass
class Given:
    """One call as the user made it. One of ``train`` and ``dense`` is the input, of T steps or of the one that is the
    same at all T; ``params`` (P, N); the states (B, N), with equations ``v0`` (K, B, N); ``rec0`` (B, C·N) is the
    recurrent current of the first step.

    ``dtype`` is that of the input and of ``synapses.weight`` and its bias. Neurons compute in :attr:`state_dtype`,
    which all else has.
    """

    name: str
    spec: NeuronSpec | Equations
    surrogate: Surrogate
    synapses: Synapses
    train: SpikeTrain | None
    dense: Tensor | None
    T: int
    B: int
    features: tuple[int, ...]
    params: Tensor
    v0: Tensor
    i0: Tensor | None
    spikes0: Tensor | None
    rec0: Tensor | None
    dtype: torch.dtype
    device: torch.device

    @property
    def N(self) -> int:
        return math.prod(self.features)

    @property
    def recurrent(self) -> bool:
        return self.synapses.recurrent is not None

    @property
    def state_dtype(self) -> torch.dtype:
        return state_dtype(self.dtype)


class Layout(NamedTuple):
    """What a call of the op is, before any number is looked at: it follows from shapes, dtypes and devices alone."""

    name: str
    spec: NeuronSpec | Equations
    surrogate: Surrogate
    T: int
    B: int
    features: tuple[int, ...]
    N: int
    dtype: torch.dtype
    device: torch.device
    recurrent: bool


def layout_of(
    x: Any,
    synapses: Synapses,
    spec: NeuronSpec | Equations,
    surrogate: Surrogate,
    steps: int | None,
    name: str,
) -> Layout:
    """Check an input and its matrices.

    Raises:
        InputError: shapes, dtypes or devices that do not fit.
    """
    recurrent = synapses.recurrent is not None
    if recurrent and not spec.spiking:
        raise InputError(f"{name}: a readout emits no spikes, so it takes no recurrent_weight.")
    _check_input(x, synapses.weight, name)
    dtype, device, (T, B) = x.dtype, x.device, x.shape[:2]
    features = _features(x, synapses.weight, spec, name)
    if steps is not None:
        if T != 1 or steps < 1:
            raise InputError(
                f"{name}: steps={steps} says how often an input of one step (1, B, ...) comes, "
                f"got {tuple(x.shape)}."
            )
        T = steps
    N = math.prod(features)
    _check_synapses(name, dtype, device, spec, N, synapses)
    if recurrent and isinstance(spec, Equations) and not spec.program.recurrent:
        raise InputError(
            f"{name}: these equations never read a recurrent current, so they take no recurrent_weight."
        )
    return Layout(name, spec, surrogate, T, B, features, N, dtype, device, recurrent)


def given(
    layout: Layout, x: Tensor | SpikeTrain | None, synapses: Synapses, params: Any, state: Any
) -> Given:
    """A call of this layout with its numbers; ``params`` may be what :func:`pack_params` gave, and ``x`` is None where
    it is what another call will have made.

    Raises:
        InputError: parameters or a state that do not fit.
    """
    name, spec, surrogate, T, B, features, _, dtype, device, recurrent = layout
    train, dense = (x, None) if isinstance(x, SpikeTrain) else (None, x)
    if x is not None and x.shape[0] != T:  # one step that comes T times
        train, dense = None, dense if train is None else train.to_dense()
    elif dense is not None and is_still(dense):
        dense = dense[:1]
    precise = state_dtype(dtype)
    packed = params if isinstance(params, Tensor) else pack_params(params, layout)
    v0, i0, s0 = _pack_state(state, spec, recurrent, (B, *features), precise, device, name)
    rec0 = None
    if recurrent:
        assert s0 is not None
        matrix, bias = cast(synapses.recurrent, precise), cast(synapses.recurrent_bias, precise)
        synapses = Synapses(synapses.weight, synapses.bias, matrix, bias)
        rec0 = F.linear(s0, matrix, bias)  # type: ignore[arg-type]
    form = (T, B, features, packed, v0, i0, s0, rec0, dtype, device)
    return Given(name, spec, surrogate, synapses, train, dense, *form)


def widened(call: Given) -> Given:
    """A call in half precision for a backend that computes in float32: with weights and an input of float32."""
    precise, synapses, train = call.state_dtype, call.synapses, call.train
    if train is not None:
        train = train._replace(dtype=precise, values=cast(train.values, precise))
    weights = synapses._replace(weight=cast(synapses.weight, precise), bias=cast(synapses.bias, precise))
    return replace(call, synapses=weights, dense=cast(call.dense, precise), train=train)


def inputs_of(spec: NeuronSpec | Equations) -> int:
    """C: how many input currents a neuron has."""
    return len(spec.inputs) if isinstance(spec, Equations) else 1


def check_finite(call: Given) -> None:
    """Raise :class:`InputError` if the dense input or a weight is NaN or infinite."""
    synapses = call.synapses
    labelled = {
        "input": call.dense,
        "weight": synapses.weight,
        "bias": synapses.bias,
        "recurrent_weight": synapses.recurrent,
    }
    for label, tensor in labelled.items():
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            raise InputError(f"{call.name}: {label} has NaN or infinite values.")


def _check_input(x: Any, weight: Tensor | None, name: str) -> None:
    if isinstance(x, Tensor):
        check_float(x, f"{name}: input")
    shape = x.shape
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


def _features(
    first: Tensor | SpikeTrain, weight: Tensor | None, spec: NeuronSpec | Equations, name: str
) -> tuple[int, ...]:
    """The shape of the neurons, N..."""
    found = (weight.shape[0],) if weight is not None else tuple(first.shape[2:])
    count = inputs_of(spec)
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


def _check_synapses(
    name: str,
    dtype: torch.dtype,
    device: torch.device,
    spec: NeuronSpec | Equations,
    neurons: int,
    synapses: Synapses,
) -> None:
    currents = inputs_of(spec) * neurons
    for label, tensor, shape in (
        ("weight", synapses.weight, None),
        ("bias", synapses.bias, (currents,)),
        ("recurrent_weight", synapses.recurrent, (currents, neurons)),
        ("recurrent_bias", synapses.recurrent_bias, (currents,)),
    ):
        if tensor is None:
            continue
        if tensor.dtype != dtype and not (
            label.startswith("recurrent") and tensor.dtype == state_dtype(dtype)
        ):
            raise InputError(
                f"{name}: {label} is {tensor.dtype}, the input {dtype}; {_same_dtype(tensor.dtype, dtype)}."
            )
        if tensor.device != device:
            raise InputError(
                f"{name}: {label} is on {tensor.device}, the input on {device}; {_same_device(tensor.device)}."
            )
        if shape is not None and tuple(tensor.shape) != shape:
            raise InputError(f"{name}: {label} has shape {tuple(tensor.shape)}, expected {shape}.")


def _same_dtype(weight: torch.dtype, given: torch.dtype) -> str:
    """What to write where a layer's weight and its input have two dtypes."""
    if {weight, given} & {
        torch.float16,
        torch.bfloat16,
    }:  # snnTorch's spikes are float32 whatever the network is
        return (
            "keep the network and its input float32 and compute in half precision under "
            'torch.autocast("cpu" or "cuda", torch.bfloat16)'
        )
    return f"convert the input with x.to({weight}), or the network with net.to({given})"


def _same_device(weight: torch.device) -> str:
    return f"move the input with x.to({str(weight)!r}), or the network with net.to(x.device)"


def _by_name(params: Any, spec: Equations, name: str) -> list[Tensor | float]:
    """The parameters of equations in the program's order."""
    known = spec.program.params
    if not isinstance(params, Mapping) or set(params) != set(known):
        given = sorted(params) if isinstance(params, Mapping) else type(params).__name__
        raise InputError(f"{name}: these equations take params {sorted(known)}, got {given}.")
    return [params[label] for label in known]


def pack_params(params: Any, layout: Layout) -> Tensor:
    """(P, N): one row a parameter. 0-dim tensors may stay on the CPU, as Norse's do."""
    name, spec, _, _, _, features, _, dtype, device, _ = layout
    dtype = state_dtype(dtype)
    names: Sequence[str] = PARAM_NAMES
    values = list(params) if isinstance(params, NeuronParams) else []
    if isinstance(spec, Equations):
        names, values = spec.program.params, _by_name(params, spec, name)
    rows = []
    N = math.prod(features)
    eager = not torch.compiler.is_compiling()
    if values and eager and all(map(_is_number, values)):
        return _constant(tuple(map(float, values)), N, dtype, device)
    for label, value in zip(names, values, strict=True):
        # a number of the host is written by the device: to copy it there would be to wait
        if not isinstance(value, Tensor) or (eager and is_device(device) and _is_number(value)):
            rows.append(torch.full((N,), float(value), dtype=dtype, device=device))
            continue
        if value.dim() and value.device != device:
            raise InputError(
                f"{name}: parameter {label!r} is on {value.device}, the input on {device}; "
                f"{_same_device(value.device)}."
            )
        try:
            row = value.to(device=device, dtype=dtype).expand(features)
        except RuntimeError as error:
            raise InputError(
                f"{name}: parameter {label!r} of shape {tuple(value.shape)} does not broadcast to the neurons "
                f"{features}."
            ) from error
        rows.append(row.reshape(N))
    return torch.stack(rows) if rows else torch.empty(0, N, dtype=dtype, device=device)


_constants: dict[tuple[Any, ...], Tensor] = {}
_MOST = 256  # constants that are kept


def _constant(numbers: tuple[float, ...], N: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A row of N for each number, made once. It has an attribute ``_snn_uniform``: a backend need not look at it.

    A CUDA graph makes its own, as it outlives what is kept here.
    """
    key = (numbers, N, dtype, device)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return _rows(*key)
    if key not in _constants:
        if len(_constants) >= _MOST:
            _constants.clear()
        with torch.inference_mode(False):
            made = _constants[key] = _rows(*key)
            made._snn_uniform = True  # type: ignore[attr-defined]
    return _constants[key]


def _rows(numbers: tuple[float, ...], N: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    # numbers of the host are written by the device: to copy them there would be to wait
    rows = torch.empty(len(numbers), N, dtype=dtype, device=device)
    for row, number in zip(rows.unbind(0), numbers, strict=True):
        row.fill_(number)
    return rows


def _is_number(value: Any) -> bool:
    """Whether a parameter is one number for all neurons, without a gradient."""
    return not isinstance(value, Tensor) or (not value.dim() and not value.requires_grad and not waits(value))


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
        if value.shape == shape and value.dtype == dtype and value.device == device:
            return value.contiguous() if len(shape) == 2 else value.reshape(flat).contiguous()
        if value.device != device and value.dim():
            raise InputError(
                f"{name}: state {label!r} is on {value.device}, the input on {device}: begin anew after net.to(...), "
                f"or move it with state.to({str(device)!r})."
            )
        if torch.promote_types(value.dtype, dtype) != dtype:
            raise InputError(
                f"{name}: state {label!r} is {value.dtype}, the input {dtype}: begin anew after a change of dtype, or "
                f"convert it with state.to({dtype})."
            )
        if is_device(device) and not torch.compiler.is_compiling() and _is_number(value):
            return torch.full(flat, float(value), dtype=dtype, device=device)
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
