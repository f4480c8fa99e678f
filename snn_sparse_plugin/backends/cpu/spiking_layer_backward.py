"""The op on CPU, backward: over the active list, or by a replay from checkpoints.

Results do not depend on timing: each thread owns a contiguous range of samples, and the ranges' gradients of weights
are added in order. With another number of threads sums are rounded in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...core.backend import (
    InputGrads,
    LayerBackward,
    LayerCall,
    Needs,
    OutputGrads,
    Saved,
    calls,
    passed_on,
)
from ...core.equations import Equations
from ..product import LARGEST, ProductGrad
from .arguments import Arriving, Derivative, Entries, Fed, Incoming, Outgoing, Recurrence
from .backward import backward_active_kernel
from .impulses import backward_impulses
from .layout import (
    DOUBLE,
    INT32,
    aligned,
    array_or_empty,
    copied,
    empty,
    flip,
    inputs_of,
    numpy_type,
    padded,
    ranges_of,
    rows_of,
    zero_rows,
)
from .linear import backward_linear_kernel, is_linear
from .memory import array
from .multiply import panels_of
from .outgoing import block_rows
from .program_backward import backward_of
from .replay import backward_replay_kernel
from .replay_linear import BLOCK_ROWS, backward_replay_linear_kernel
from .rows import MEM
from .spiking_layer import code_of
from .surrogate import slopes
from .threads import parallel
from .way import Way, empty_list, input_is_listed, only_decays, wants_params, way_of

LISTED, REPLAYED = 1.0, 3.0
"""Time of a backward over the list, and of one that replays, by that of the forward."""


class _Left(NamedTuple):
    """Gradients that each sample has for itself; written, or of the states changed, in place: ``v`` and ``i`` are what
    flows to the last step from the state after it, then what flows to the state before the first step."""

    v: np.ndarray
    i: np.ndarray
    active: Tensor | None  # of the active entries of the input
    nu: Tensor | None  # of the currents, (T or 1, B, C·N)
    rec0: np.ndarray | None


class _Sums(NamedTuple):
    """Gradients that all samples add to, of one range of them; of weights the rows of W^T. ``all_rows`` are those of
    the next four, one after the other."""

    all_rows: np.ndarray
    weight: np.ndarray
    bias: np.ndarray
    rec_weight: np.ndarray
    rec_bias: np.ndarray
    params: np.ndarray


class _Shared(NamedTuple):
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


class _Ready(NamedTuple):
    """A layer whose kernel may run. ``passed``: the gradient of its input, which the kernel fills; None where it is
    made of what the kernel leaves."""

    layer: LayerBackward
    way: Way
    left: _Left
    shared: _Shared
    passed: Tensor | None


def run_backward(layers: Sequence[LayerBackward], grads: OutputGrads) -> list[InputGrads]:
    """Layers of which each took the events of the one before; ``grads`` arrive at the last.

    As many as possible run on each range of samples one after the other: until numbers of all are asked for.
    """
    found: list[InputGrads] = []  # the last layer's first
    together: list[_Ready] = []
    for k in range(len(layers) - 1, -1, -1):
        layer, way = _with_way(layers[k], grads)
        if together and isinstance(grads.spikes, ProductGrad) and not way.linear:
            found += _run(together)  # it will be multiplied now
            together = []
        together.append(_ready(layer, way, grads))
        passed = together[-1].passed
        if k and passed is None:
            found += _run(together)
            together, passed = [], found[-1].input
        if k:
            assert passed is not None
            grads = passed_on(layers[k - 1].saved, passed)
    return [*found, *_run(together)][::-1]


def _with_way(layer: LayerBackward, grads: OutputGrads) -> tuple[LayerBackward, Way]:
    """Which kernel runs; of a layer that only decays, on an empty list."""
    call, saved, events, needs = layer
    if only_decays(call, saved, events, grads, needs):
        saved = empty_list(call)
        layer = layer._replace(saved=saved)
    return layer, way_of(call, saved, grads, needs)


def _ready(layer: LayerBackward, way: Way, grads: OutputGrads) -> _Ready:
    call, saved, events, needs = layer
    left = _allocated(call, way, grads, needs)
    shared = _shared(call, saved, events, grads, needs, way, left)
    calls["cpu", "backward:list" if way.by_list else "backward:replay"] += 1
    if way.impulses:
        calls["cpu", "backward:impulses"] += 1
    passed = left.active
    if left.nu is not None:
        passed = left.nu if call.train is None else _product(left.nu, call.weight)  # type: ignore[arg-type]
    return _Ready(layer, way, left, shared, passed)


def _run(together: list[_Ready]) -> list[InputGrads]:
    """The kernels of layers, the last layer's first."""
    costs = [LISTED if ready.way.by_list else REPLAYED for ready in together]
    ranges = ranges_of([ready.layer.call for ready in together], costs)
    if len(ranges) == 1:
        return [_run_alone(ready, *ranges) for ready in together]
    rooms = [[_room(ready.layer.call, ready.layer.needs) for _ in ranges] for ready in together]
    # all that is Python's is done before another thread is woken: two that take turns at it wait for each other
    tasks: list[list[Callable[[], None]]] = [[] for _ in ranges]
    for ready, parts in zip(together, rooms, strict=True):
        for in_turn, part, samples in zip(tasks, parts, ranges, strict=True):
            in_turn += _tasks(ready, part, samples)
    parallel([partial(_in_turn, each) for each in tasks])
    for parts in rooms:
        for part in parts[1:]:  # in order, and in place of the first
            np.add(parts[0].all_rows, part.all_rows, out=parts[0].all_rows)
            np.add(parts[0].params, part.params, out=parts[0].params)
    return [_collected(ready, parts[0]) for ready, parts in zip(together, rooms, strict=True)]


def _run_alone(ready: _Ready, samples: tuple[int, int]) -> InputGrads:
    """On this thread, with all samples."""
    sums = _room(ready.layer.call, ready.layer.needs)
    _in_turn(_tasks(ready, sums, samples))
    return _collected(ready, sums)


def _in_turn(tasks: list[Callable[[], None]]) -> None:
    for task in tasks:
        task()


# --- what kernels are given ---


def _allocated(call: LayerCall, way: Way, grads: OutputGrads, needs: Needs) -> _Left:
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
    return _Left(v, i, active, nu, rec0)


def _shared(
    call: LayerCall,
    saved: Saved,
    events: tuple[Tensor, Tensor] | None,
    grads: OutputGrads,
    needs: Needs,
    way: Way,
    left: _Left,
) -> _Shared:
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
    return _Shared(
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


# --- one range of samples ---


def _tasks(ready: _Ready, sums: _Sums, samples: tuple[int, int]) -> list[Callable[[], None]]:
    """What leaves in ``sums``, whose memory is new, what these samples give; in turn."""
    (call, saved, *_), way, _, shared, _ = ready
    outgoing = Outgoing(
        *(sums.weight, sums.bias, shared.g_active, shared.g_current),
        *(sums.rec_weight, sums.rec_bias, shared.g_rec0),
    )
    within = (*samples, call.T)
    if way.impulses:
        task = _impulses(call, shared, outgoing, within)
    elif way.by_list:
        task = _list(call, shared, outgoing, within)
    else:
        task = _replay(call, saved, way, shared, outgoing, sums.params, within)
    tasks = [partial(_clear, sums)]
    if shared.u.size:
        indptr, (first, last) = shared.active.indptr, samples
        entries = slice(indptr[first * call.T], indptr[last * call.T])
        tasks.append(partial(slopes, *shared.derivative[1:], shared.u[entries], shared.phi[entries]))
    return [*tasks, task]


def _clear(sums: _Sums) -> None:
    sums.all_rows.fill(0)  # on the thread that adds to them, in whose cache they are then
    sums.params.fill(0)


def _room(call: LayerCall, needs: Needs) -> _Sums:
    weight = 0
    if needs.weight and call.weight is not None and call.train is not None:
        weight = call.weight.shape[1]
    bias = weight + (needs.bias and call.bias is not None)
    recurrent = bias + (call.N if needs.rec_weight and call.rec_weight is not None else 0)
    end = recurrent + (needs.rec_bias and call.rec_bias is not None)
    rows = aligned(end, padded(call.currents), numpy_type(call.v0.dtype))
    params = np.empty((len(call.params), call.N)) if wants_params(call, needs) else empty(DOUBLE, 2)
    return _Sums(rows, rows[:weight], rows[weight:bias], rows[bias:recurrent], rows[recurrent:], params)


def _impulses(
    call: LayerCall, shared: _Shared, outgoing: Outgoing, samples: tuple[int, int, int]
) -> Callable[[], None]:
    dtype, width = shared.incoming.weight.dtype, shared.incoming.weight.shape[1]
    return partial(
        backward_impulses,
        *(*samples, shared.params[MEM, 0], shared.incoming[:6], shared.active, shared.phi),
        *(shared.arriving[:2], shared.states[0]),
        (zero_rows(1, call.currents, dtype), aligned(1, width, dtype)),
        outgoing[:3],
    )


def _list(
    call: LayerCall, shared: _Shared, outgoing: Outgoing, samples: tuple[int, int, int]
) -> Callable[[], None]:
    code = code_of(call)
    return partial(
        backward_linear_kernel(code) if is_linear(code) else backward_active_kernel(code),
        *(*samples, shared.params, array(call.v0), shared.inputs.rec_weight, shared.incoming, shared.active),
        *(shared.u, shared.phi, _block(call), shared.arriving, *shared.states, outgoing),
    )


def _replay(
    call: LayerCall,
    saved: Saved,
    way: Way,
    shared: _Shared,
    outgoing: Outgoing,
    g_params: np.ndarray,
    samples: tuple[int, int, int],
) -> Callable[[], None]:
    dtype, inputs = numpy_type(call.v0.dtype), shared.inputs
    checkpoints = (
        array_or_empty(saved.v_checkpoints, dtype, 3),
        array_or_empty(saved.i_checkpoints, dtype, 3),
    )
    start = (*samples, shared.derivative, shared.params, checkpoints, inputs.current, inputs.bias)
    if way.linear:
        block = zero_rows(BLOCK_ROWS, call.N, dtype)
        return partial(
            backward_replay_linear_kernel(code_of(call)),
            *(*start, shared.mem, shared.incoming, shared.active, shared.arriving, shared.product),
            *(*shared.states, outgoing, block, block.reshape(-1)),
        )
    recurrence = Recurrence(inputs.rec_weight, inputs.rec_bias, inputs.rec0)
    return partial(
        _replay_kernel(call, dtype),
        *(*start, recurrence, shared.incoming, shared.active, shared.arriving),
        *(*shared.states, outgoing, g_params, _block(call)),
    )


def _replay_kernel(call: LayerCall, dtype: np.dtype) -> Callable[..., Any]:
    if isinstance(call.spec, Equations):
        return backward_of(call, padded(call.N), dtype)
    return backward_replay_kernel(code_of(call))  # type: ignore[no-any-return]


def _block(call: LayerCall) -> np.ndarray:
    """Room for the gradients of the currents of a few steps."""
    return zero_rows(block_rows(padded(call.currents)), call.currents, numpy_type(call.v0.dtype))


# --- what comes back ---


def _collected(ready: _Ready, sums: _Sums) -> InputGrads:
    (call, _, _, needs), _, left, _, grad_input = ready
    if grad_input is None and left.nu is not None:
        grad_input = left.nu @ call.weight  # type: ignore[operator]
    params = sums.params
    return InputGrads(
        grad_input,
        _weight(sums.weight, call.currents),
        _bias(sums.bias, call.currents),
        _weight(sums.rec_weight, call.currents),
        _bias(sums.rec_bias, call.currents),
        None if left.rec0 is None else torch.from_numpy(left.rec0),
        torch.from_numpy(left.v) if needs.v0 else None,
        torch.from_numpy(left.i) if needs.i0 and call.i0 is not None else None,
        torch.from_numpy(params.astype(numpy_type(call.v0.dtype))) if params.size else None,
    )


def _weight(rows: np.ndarray, currents: int) -> Tensor | None:
    """The gradient of W from rows of W^T."""
    return torch.from_numpy(flip(rows, np.empty((currents, len(rows)), rows.dtype))) if rows.size else None


def _bias(row: np.ndarray, currents: int) -> Tensor | None:
    return torch.from_numpy(row[0, :currents].copy()) if row.size else None


def _product(nu: Tensor, weight: Tensor) -> Tensor | None:
    """The gradient of a layer's dense input, ``nu @ weight``, if it is to be multiplied by whoever takes it."""
    # see LARGEST; a kernel multiplies six rows at a time, and each sample in one thread
    T, B, K = nu.shape
    if K > LARGEST and (T < 4 or torch.get_num_threads() > B or nu.dtype != torch.float32):
        return None
    # of its own: a hook may update the weight as soon as it has its gradient, before the product is made
    return ProductGrad(nu, torch.from_numpy(array(weight).copy()))
