"""Arrays of a backward on CPU: what the kernels are given, and what they fill."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...core.backend import LayerBackward, LayerCall, Needs, OutputGrads
from ..product import ProductGrad
from .arguments import Arriving, Derivative, Entries, Fed, Incoming
from .layout import (
    DOUBLE,
    INT32,
    aligned,
    array_or_empty,
    copied,
    empty,
    numpy_type,
    padded,
)
from .memory import array
from .multiply import panels_of
from .way import Way, input_is_listed, wants_params
from .weights import inputs_of, rows_of


class Left(NamedTuple):
    """Gradients that each sample has for itself; written, or of the states changed, in place: ``v`` and ``i`` are what
    flows to the last step from the state after it, then what flows to the state before the first step."""

    v: np.ndarray
    i: np.ndarray
    active: Tensor | None  # of the active entries of the input
    nu: Tensor | None  # of the currents, (T or 1, B, C·N)
    rec0: np.ndarray | None


class Sums(NamedTuple):
    """Gradients that all samples add to, of one range of them; of weights the rows of W^T. ``all_rows`` are those of
    the next four, one after the other."""

    all_rows: np.ndarray
    weight: np.ndarray
    bias: np.ndarray
    rec_weight: np.ndarray
    rec_bias: np.ndarray
    params: np.ndarray


class Shared(NamedTuple):
    """Arguments of the kernels that all ranges of samples share."""

    params: np.ndarray
    inputs: Fed
    incoming: Incoming
    active: Entries
    u: np.ndarray
    phi: np.ndarray  # room for the surrogate's derivative at ``u``
    mem: np.ndarray
    derivative: Derivative
    arriving: Arriving
    product: tuple[np.ndarray, np.ndarray]
    states: tuple[np.ndarray, np.ndarray]
    g_active: np.ndarray
    g_current: np.ndarray
    g_rec0: np.ndarray


def allocated(call: LayerCall, way: Way, grads: OutputGrads, needs: Needs) -> Left:
    dtype, currents = call.v0.dtype, call.currents
    kind = numpy_type(dtype)
    v, i = copied(grads.v, call.v0.shape, kind), copied(grads.i, (call.B, call.N), kind)
    active = nu = rec0 = None
    if way.nu:
        alone = call.once or call.T == 1  # most kernels add to a single step, and write each of several
        nu = torch.empty(1 if alone else call.T, call.B, currents, dtype=dtype)
        if alone and not (way.linear and call.train is None):
            array(nu).fill(0)
    elif needs.input:
        active = torch.empty(call.train.active.indices.numel(), dtype=dtype)  # type: ignore[union-attr]
    if needs.rec0 and call.rec0 is not None:
        rec0 = copied(None, (call.B, currents), kind)
    return Left(v, i, active, nu, rec0)


def shared_of(layer: LayerBackward, grads: OutputGrads, way: Way, left: Left) -> Shared:
    call, saved, events, needs = layer
    dtype = numpy_type(call.v0.dtype)
    none = empty(INT32, 1)
    # without input gradients a list, or the membrane, never looks at the weights
    columns = not way.impulses and (input_is_listed(call) or not (way.by_list or saved.mem is not None))
    inputs = inputs_of(call, dtype, weight=columns)
    weight = rows_of(call.weight if needs.input else None, dtype) if way.impulses else inputs.weight
    in_ptr, in_idx = (none, none) if left.active is None else (array(x) for x in call.train.active)  # type: ignore[union-attr]
    out_ptr, out_idx = (none, none) if events is None else (array(x) for x in events)
    incoming = (inputs.indptr, inputs.indices, inputs.values, weight, in_ptr, in_idx, out_ptr, out_idx)
    arriving, product = _arriving(grads, way, dtype)
    window = -1.0 if saved.threshold is None else saved.threshold
    u = array_or_empty(saved.u if way.by_list else None, dtype, 1)
    return Shared(
        array(call.params),
        inputs,
        Incoming(*incoming),
        Entries(none, none) if saved.active is None else Entries(*(array(x) for x in saved.active)),
        u,
        np.empty_like(u),
        array_or_empty(saved.mem, dtype, 3),
        Derivative(window, call.surrogate.code, *call.surrogate.packed),
        arriving,
        product,
        (left.v, left.i),
        array_or_empty(left.active, dtype, 1),
        array_or_empty(left.nu, dtype, 3),
        empty(dtype, 2) if left.rec0 is None else left.rec0,
    )


def _arriving(
    grads: OutputGrads, way: Way, dtype: np.dtype
) -> tuple[Arriving, tuple[np.ndarray, np.ndarray]]:
    """Gradients that arrive, and apart from them the spikes' where the kernel multiplies it from two factors."""
    spikes, product = grads.spikes, (empty(dtype, 3), empty(dtype, 2))
    if isinstance(spikes, ProductGrad):
        if way.linear:
            product, spikes = (array(spikes.nu), panels_of(spikes.weight, dtype)), None
        else:
            spikes = spikes.dense()
    dense = array_or_empty(spikes, dtype, 3), array_or_empty(grads.mem, dtype, 3)
    return Arriving(array_or_empty(grads.active, dtype, 1), *dense), product


def room(call: LayerCall, needs: Needs) -> Sums:
    weight = 0
    if needs.weight and call.weight is not None and call.train is not None:
        weight = call.weight.shape[1]
    bias = weight + (needs.bias and call.bias is not None)
    recurrent = bias + (call.N if needs.rec_weight and call.rec_weight is not None else 0)
    end = recurrent + (needs.rec_bias and call.rec_bias is not None)
    rows = aligned(end, padded(call.currents), numpy_type(call.v0.dtype))
    params = np.empty((len(call.params), call.N)) if wants_params(call, needs) else empty(DOUBLE, 2)
    return Sums(rows, rows[:weight], rows[weight:bias], rows[bias:recurrent], rows[recurrent:], params)
