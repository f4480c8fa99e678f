"""The op on CPU, forward: samples are split over threads, buffers allocated, kernels launched, parts joined.

Results do not depend on timing: each thread owns a contiguous range of samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...core.backend import CHUNK, LayerCall, LayerResult, Saved, check_finite, enter, keeps_active
from ...core.csr import MAX_EVENTS, Active
from ...core.dynamics import NeuronSpec
from ...core.equations import Equations
from ...core.errors import InputError
from .arguments import Fed, States, Written
from .bits import LANES
from .forward import forward_kernel
from .layout import are_small, array_or_empty, empty, finite, joined, numpy_type, padded, ranges_of
from .memory import array, tensor
from .program import forward_of
from .replay_linear import replays_linear
from .rows import Code, encode
from .threads import in_stages
from .weights import KEEP_BELOW, are_finite, inputs_of

# Above this share of active neuron-steps a list of them (8 bytes each) is larger, and its row-by-row input
# gradient slower, than checkpoints, a replay and one dense product.
LIST_BELOW = 0.125

# With so many input events for each neuron-step the membrane (4 bytes each) is kept: it takes little memory next to
# the events, and the backward need not add their rows again. Up to so many neuron-steps it is in any case, as it stays
# in cache.
KEEP_MEM_ABOVE, KEEP_MEM_OF = 4, 1 << 16

# Up to this share of spikes the sizes alone say that a layer keeps no membrane; with more it is replayed all the same.
MANY = 0.1


class _Wanted(NamedTuple):
    """What a forward leaves behind."""

    active: bool  # the list of active neuron-steps, where there are few
    events: bool
    mem: bool  # for the backward


class _Made(NamedTuple):
    """What a forward fills: arrays, and as tensors what may be large and is handed on."""

    v: np.ndarray
    i: np.ndarray
    v_checkpoints: np.ndarray
    i_checkpoints: np.ndarray
    spikes: Tensor | None
    mem: Tensor | None


class _Shared(NamedTuple):
    """Arguments of the kernel that all ranges of samples share."""

    window: float
    params: np.ndarray
    inputs: Fed
    states: States
    spikes: np.ndarray
    mem: np.ndarray


class _Layer(NamedTuple):
    """A call, and what its forward fills."""

    call: LayerCall
    wanted: _Wanted
    made: _Made
    shared: _Shared
    kernel: Callable[..., Any]


class _Part(NamedTuple):
    """What one range of samples left: lists, and where each row ends in them, counted from the range's first."""

    out_ptr: np.ndarray
    events: np.ndarray
    act_ptr: np.ndarray
    active: np.ndarray
    distance: np.ndarray  # membrane - threshold of the active entries
    seen: int  # active entries, of which those above ``LIST_BELOW`` were not listed


def run_forward(calls: Sequence[LayerCall]) -> list[LayerResult]:
    """Layers of which each takes the events of the one before, which are put into its call.

    They run on each range of samples one after the other, up to one that has to know how many events enter it; large
    ones each by itself.
    """
    results: list[LayerResult] = []
    first = 0
    for end in range(1, len(calls) + 1):
        if end == len(calls) or _asks_for_events(calls[end]) or not are_small(calls[first : end + 1]):
            if first:
                enter(calls[first], results[-1])
            _run(calls[first:end], results)
            first = end
    return results


def _run(calls: Sequence[LayerCall], results: list[LayerResult]) -> None:
    layers = []
    for call in calls:
        wanted = _wanted(call)
        made = _allocated(call, wanted)
        layers.append(_Layer(call, wanted, made, _shared(call, made), _kernel(call)))
    assert all(layer.wanted.events for layer in layers[:-1])
    ranges = ranges_of(calls)
    stages = [partial(_run_range, layer) for layer in layers]

    def finish(k: int, parts: list[_Part], before: LayerResult | None) -> LayerResult:
        if before is not None:
            enter(calls[k], before)
        return _result(layers[k], ranges, parts)

    results += in_stages(ranges, stages, finish)


def _result(layer: _Layer, ranges: list[tuple[int, int]], parts: Sequence[_Part]) -> LayerResult:
    """What the ranges left together."""
    call, wanted, made, shared, _ = layer
    T, steps, fed = call.T, call.T * call.B * call.N, shared.inputs
    if not (
        finite(made.v, shared.params, fed.bias)
        and are_finite(call.weight, fed.weight)
        and are_finite(call.rec_weight, fed.rec_weight)
    ):
        check_finite(call, torch.from_numpy(made.v))

    windowed = shared.window >= 0
    seen = listed = 0
    for part in parts:
        seen, listed = seen + part.seen, listed + part.active.size
    fraction = seen / steps if windowed and steps else 1.0
    threshold, active, u = call.threshold, None, None
    if windowed and steps and fraction < call.min_active:
        threshold = None  # too few would learn: this call is exact
    elif wanted.active and seen == listed:
        ptr, entries = _joined([part.act_ptr for part in parts], [part.active for part in parts], ranges, T)
        active = Active(tensor(ptr), tensor(entries))
        u = tensor(joined([part.distance for part in parts]))
    events = None
    if wanted.events:
        ptr, entries = _joined([part.out_ptr for part in parts], [part.events for part in parts], ranges, T)
        events = torch.from_numpy(ptr), torch.from_numpy(entries)
    return LayerResult(
        made.spikes,
        events,
        made.mem if call.want_mem else None,
        torch.from_numpy(made.v),
        torch.from_numpy(made.i) if _has_synapse(call) else None,
        _saved(call, wanted, made, fed.weight, threshold, active, u) if call.needs_grad else None,
        fraction,
    )


def _wanted(call: LayerCall) -> _Wanted:
    spec = call.spec
    learns = call.needs_grad and call.save_active and spec.spiking and call.threshold is not None
    active = learns and keeps_active(call)
    resets_by_event = isinstance(spec, NeuronSpec) and spec.reset in ("zero", "value")
    events = call.want_events or call.rec_weight is not None or (active and resets_by_event)
    return _Wanted(active, events, _keeps_mem(call))


def _keeps_mem(call: LayerCall) -> bool:
    """Whether to keep the membrane after every step for a backward that then has nothing to replay."""
    steps = call.T * call.B * call.N
    small = steps <= KEEP_MEM_OF and call.current is None
    many = call.train is not None and call.train.indices.numel() > KEEP_MEM_ABOVE * steps
    return (small or many) and _may_keep_mem(call)


def _asks_for_events(call: LayerCall) -> bool:
    """Whether how many events enter a layer, of which there are none yet, decides if the membrane is kept."""
    if call.T * call.B * call.N <= KEEP_MEM_OF:
        return False
    return call.weight.shape[1] * MANY > KEEP_MEM_ABOVE * call.N and _may_keep_mem(call)  # type: ignore[union-attr]


def _may_keep_mem(call: LayerCall) -> bool:
    """Whether a backward would read the membrane."""
    if not (call.needs_grad and call.save_active) or call.params_grad or not has_linear_replay(call):
        return False
    assert isinstance(call.spec, NeuronSpec)
    return call.spec.reset == "none" or call.spec.timing == "delayed"  # else it is no more what spiked


def _allocated(call: LayerCall, wanted: _Wanted) -> _Made:
    T, B, N, dtype = call.T, call.B, call.N, call.v0.dtype
    kind, synapse = numpy_type(dtype), _has_synapse(call)
    v = array(call.v0).copy()
    chunks = -(-T // CHUNK) if call.needs_grad else 0
    return _Made(
        v,
        array(call.i0).copy() if synapse else empty(kind, 2),  # type: ignore[arg-type]
        np.empty((chunks, *v.shape), kind),
        np.empty((chunks if synapse else 0, B, N), kind),
        torch.empty(T, B, N, dtype=dtype) if call.want_spikes and call.spec.spiking else None,
        torch.empty(T, B, N, dtype=dtype) if call.want_mem or wanted.mem else None,
    )


def _shared(call: LayerCall, made: _Made) -> _Shared:
    dtype = numpy_type(call.v0.dtype)
    exact = call.threshold is None or not call.needs_grad or not call.spec.spiking
    return _Shared(
        -1.0 if exact else call.threshold,  # type: ignore[arg-type]
        array(call.params),
        inputs_of(call, dtype),
        States(made.v, made.i, made.v_checkpoints, made.i_checkpoints),
        array_or_empty(made.spikes, dtype, 3),
        array_or_empty(made.mem, dtype, 3),
    )


def _run_range(layer: _Layer, samples: tuple[int, int], before: _Part | None) -> _Part:
    """A range of samples of a layer, of which what the layer before left of them is the input."""
    fed = layer.shared.inputs
    if before is not None:
        fed = fed._replace(indptr=before.out_ptr, indices=before.events)
    return _run_layer(layer, fed, *samples)


def _run_layer(layer: _Layer, fed: Fed, first: int, last: int) -> _Part:
    """The kernel stops where its events find no more room, and goes on with twice of it."""
    call, wanted, _, (window, params, _, states, spikes, mem), forward = layer
    T, N, dtype, rows = call.T, call.N, params.dtype, call.B * call.T + 1
    size = (last - first) * T * N
    events = np.empty(size // 16 + T * N + LANES if wanted.events else 0, dtype=np.int32)
    room = int(LIST_BELOW * size) + N + 2 * LANES if wanted.active else 0
    active, distance = np.empty(room, dtype=np.int32), np.empty(room, dtype=dtype)
    out_ptr = np.zeros(rows if wanted.events else 0, dtype=np.int32)
    act_ptr = np.zeros(rows if wanted.active else 0, dtype=np.int32)
    counts = np.zeros(3, dtype=np.int64)
    at = first
    while True:
        written = Written(spikes, mem, out_ptr, events, act_ptr, active, distance, counts)
        at = forward(at, last, T, window, params, fed, states, written)
        if at == last:
            n, n_act, seen = counts.tolist()
            return _Part(out_ptr, events[:n], act_ptr, active[:n_act], distance[:n_act], seen)
        grown = np.empty(2 * events.size + T * N + LANES, dtype=np.int32)
        grown[: counts[0]] = events[: counts[0]]
        events = grown


def _kernel(call: LayerCall) -> Callable[..., Any]:
    dtype = numpy_type(call.v0.dtype)
    if isinstance(call.spec, Equations):
        return forward_of(call, padded(call.N), dtype)
    return forward_kernel(code_of(call), dtype)  # type: ignore[no-any-return]


def _saved(
    call: LayerCall,
    wanted: _Wanted,
    made: _Made,
    rows: np.ndarray,
    threshold: float | None,
    active: Active | None,
    u: Tensor | None,
) -> Saved:
    """What the backward reads: the active list, or the membrane, or checkpoints to replay from."""
    mem = None
    if wanted.mem and u is None:
        assert made.mem is not None
        # what the caller gets may be written to
        mem = torch.from_numpy(array(made.mem).copy()) if call.want_mem else made.mem
    replays = mem is None and (u is None or call.params_grad or needs_states(call.spec))
    reads_rows = replays or (call.train is not None and call.train.active is not None)
    return Saved(
        threshold,
        active,
        None if isinstance(call.spec, Equations) else u,
        tensor(made.v_checkpoints) if replays else None,
        tensor(made.i_checkpoints) if replays and _has_synapse(call) else None,
        needs_current=replays,
        mem=mem,
        rows=tensor(rows) if reads_rows and 0 < rows.nbytes <= KEEP_BELOW else None,
    )


def _joined(
    ptrs: list[np.ndarray], lists: list[np.ndarray], ranges: list[tuple[int, int]], T: int
) -> tuple[np.ndarray, np.ndarray]:
    """Where each row ends, of ends that are counted anew in every range of samples, and the lists in one."""
    base = 0
    for ptr, entries, (first, last) in zip(ptrs, lists, ranges, strict=True):
        if ptr is not ptrs[0]:
            rows = slice(first * T + 1, last * T + 1)
            np.add(ptr[rows], base, out=ptrs[0][rows])
        base += entries.size
        if base > MAX_EVENTS:
            raise InputError(f"more than {MAX_EVENTS} events in one layer; split the batch.")
    return ptrs[0], joined(lists)


def _has_synapse(call: LayerCall) -> bool:
    return isinstance(call.spec, NeuronSpec) and call.spec.synapse


# --- what forward and backward both ask of a call ---


def code_of(call: LayerCall) -> Code:
    """The member of the neuron family, as kernels are compiled for it."""
    assert isinstance(call.spec, NeuronSpec)
    return _encoded(call.spec, call.rec_weight is not None)


_encoded = cache(encode)


def needs_states(spec: NeuronSpec | Equations) -> bool:
    """Whether the adjoint needs the state itself, not only the spikes and the active list."""
    return isinstance(spec, Equations) or (spec.timing == "corrected" and spec.reset == "zero")


def has_linear_replay(call: LayerCall) -> bool:
    """Whether ``replay_linear.py`` knows this neuron."""
    return isinstance(call.spec, NeuronSpec) and replays_linear(code_of(call), padded(call.N))
