"""The op on CPU: samples are split over threads, buffers allocated, kernels launched, partial sums added.

Results do not depend on timing: each thread owns a contiguous range of samples and partial weight gradients are
added in order. With another number of threads sums are rounded in another order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...core.backend import (
    CHUNK,
    InputGrads,
    LayerCall,
    LayerResult,
    Needs,
    OutputGrads,
    Saved,
    calls,
    check_finite,
    keeps_active,
)
from ...core.dynamics import NeuronSpec
from ...core.equations import Equations
from ...core.errors import InputError
from ...core.spikes import MAX_EVENTS, Active
from ..product import LARGEST, ProductGrad
from .arguments import Arriving, Derivative, Entries, Fed, Incoming, Outgoing, Recurrence, States, Written
from .backward import backward_active_kernel
from .bits import LANES
from .forward import forward_kernel
from .impulses import backward_impulses
from .linear import backward_linear_kernel, is_linear
from .memory import array
from .outgoing import block_rows
from .program import forward_of
from .program_backward import backward_of
from .replay import backward_replay_kernel
from .replay_linear import backward_replay_linear_kernel, replays_linear
from .rows import MEM, Code, encode, transpose
from .threads import parallel, split

# Above this share of active neuron-steps a list of them (8 bytes each) is larger, and its row-by-row input
# gradient slower, than checkpoints, a replay and one dense product.
LIST_BELOW = 0.125

# With so many input events for each neuron-step the membrane (4 bytes each) is kept, small beside them, so that the
# backward need not add their rows again.
KEEP_MEM_ABOVE = 4


def run_forward(call: LayerCall) -> LayerResult:
    T, B, N, spec = call.T, call.B, call.N, call.spec
    dtype = call.v0.dtype
    np_dtype = np.dtype("float32" if dtype == torch.float32 else "float64")
    programmed = isinstance(spec, Equations)
    synapse = isinstance(spec, NeuronSpec) and spec.synapse
    resets_by_event = isinstance(spec, NeuronSpec) and spec.reset in ("zero", "value")
    want_list = call.needs_grad and call.save_active and spec.spiking and call.threshold is not None
    want_list = want_list and keeps_active(call)
    want_events = call.want_events or call.rec_weight is not None or (want_list and resets_by_event)
    v, i = (
        _copied(call.v0, call.v0.shape, np_dtype),
        _copied(call.i0, (B, N) if synapse else (0, 0), np_dtype),
    )
    chunks = -(-T // CHUNK) if call.needs_grad else 0
    v_checkpoints = torch.empty(chunks, *v.shape, dtype=dtype)
    i_checkpoints = torch.empty(chunks if synapse else 0, B, N, dtype=dtype)
    spikes = torch.empty(T, B, N, dtype=dtype) if call.want_spikes and spec.spiking else None
    keep_mem = _keeps_mem(call)
    mem = torch.empty(T, B, N, dtype=dtype) if call.want_mem or keep_mem else None
    out_ptr = np.zeros(B * T + 1 if want_events else 0, dtype=np.int32)
    act_ptr = np.zeros(B * T + 1 if want_list else 0, dtype=np.int32)
    inputs = _inputs(call, np_dtype)
    window = -1.0 if call.threshold is None or not call.needs_grad or not spec.spiking else call.threshold
    params = array(call.params)
    states = States(*(array(x) for x in (v, i, v_checkpoints, i_checkpoints)))
    records = _array(spikes, np_dtype, 3), _array(mem, np_dtype, 3)

    def run(first: int, last: int) -> list[Any]:
        forward = _forward(call, np_dtype)
        size = (last - first) * T * N
        events = np.empty(size // 16 + T * N + LANES if want_events else 0, dtype=np.int32)
        room = int(LIST_BELOW * size) + N + 2 * LANES if want_list else 0
        act_idx, act_x = np.empty(room, dtype=np.int32), np.empty(room, dtype=np_dtype)
        counts = np.zeros(3, dtype=np.int64)
        at = first
        while True:
            written = Written(*records, out_ptr, events, act_ptr, act_idx, act_x, counts)
            at = forward(at, last, T, window, params, inputs, states, written)
            if at == last:
                return [events[: counts[0]], act_idx[: counts[1]], act_x[: counts[1]], counts]
            grown = np.empty(2 * events.size + T * N + LANES, dtype=np.int32)
            grown[: counts[0]] = events[: counts[0]]
            events = grown

    ranges = split(B)
    parts = parallel([lambda r=r: run(*r) for r in ranges])  # type: ignore[misc]
    check_finite(call, v, _is_finite)

    seen = sum(int(part[3][2]) for part in parts)
    steps = T * B * N
    fraction = seen / steps if window >= 0 and steps else 1.0
    threshold, active, u = call.threshold, None, None
    if window >= 0 and steps and fraction < call.min_active:
        threshold = None  # too few would learn: this call is exact
    elif want_list and seen == sum(part[1].size for part in parts):
        active = Active(_join_ptr(act_ptr, ranges, parts, 1, T), _join(part[1] for part in parts))
        u = _join(part[2] for part in parts)
    saved = None
    if call.needs_grad:
        replays = u is None or call.params_grad or _needs_replay(spec)
        kept_mem = None
        if keep_mem and u is None:
            assert mem is not None
            # what the caller gets may be written to
            kept_mem, replays = torch.from_numpy(mem.numpy().copy()) if call.want_mem else mem, False
        saved = Saved(
            threshold,
            active,
            None if programmed else u,
            v_checkpoints if replays else None,
            i_checkpoints if replays and synapse else None,
            needs_current=replays,
            mem=kept_mem,
        )
    events_out = None
    if want_events:
        events_out = (_join_ptr(out_ptr, ranges, parts, 0, T), _join(part[0] for part in parts))
    given, fraction = mem if call.want_mem else None, fraction if window >= 0 else 1.0
    return LayerResult(spikes, events_out, given, v, i if synapse else None, saved, fraction)


def run_backward(
    call: LayerCall,
    saved: Saved,
    events: tuple[Tensor, Tensor] | None,
    grads: OutputGrads,
    needs: Needs,
) -> InputGrads:
    T, B, N, currents = call.T, call.B, call.N, call.currents
    dtype = call.v0.dtype
    np_dtype = np.dtype("float32" if dtype == torch.float32 else "float64")
    train = call.train
    M = 0 if call.weight is None else call.weight.shape[1]
    sparse_input = train is not None and train.active is not None
    want_params = needs.params and call.params_grad
    use_list = saved.u is not None and not want_params and not _needs_replay(call.spec)
    if not (use_list or want_params) and _only_decays(call, grads, events):
        # the loss sees the membrane alone, as in many readouts: an empty list says so, and nothing is replayed
        empty = torch.empty(0, dtype=torch.int32)
        saved = Saved(
            None, Active(torch.zeros(B * T + 1, dtype=torch.int32), empty), torch.empty(0, dtype=dtype)
        )
        use_list = True
    linear = not (use_list or want_params) and _replays_linear(call)
    dense_nu = needs.input and not sparse_input
    impulses = use_list and not dense_nu and grads.mem is None
    impulses = impulses and _are_impulses(call) and _adds_less(call, saved)
    # without input gradients a list, or the membrane, never looks at the weights
    columns = not impulses and (sparse_input or not (use_list or saved.mem is not None))
    inputs = _inputs(call, np_dtype, rows=columns)
    cv, ci = _copied(grads.v, call.v0.shape, np_dtype), _copied(grads.i, (B, N), np_dtype)
    nu = None
    if dense_nu:
        alone = call.once or T == 1  # most kernels add to a single step, and write each of several
        nu = torch.empty(1 if alone else T, B, currents, dtype=dtype)
        if alone and not (linear and train is None):
            nu.numpy().fill(0)
    g_active = None
    none = np.empty(0, dtype=np.int32)
    in_ptr, in_idx = none, none
    if needs.input and sparse_input:
        in_ptr, in_idx = (array(x) for x in train.active)  # type: ignore[union-attr]
        g_active = torch.empty(in_idx.size, dtype=dtype)
    g_rec0 = _copied(None, (B, currents), np_dtype) if needs.rec0 and call.rec0 is not None else None
    out_ptr, out_idx = (none, none) if events is None else (array(x) for x in events)
    active = Entries(none, none) if saved.active is None else Entries(*(array(x) for x in saved.active))
    g_spikes, product = grads.spikes, (np.empty((0, 0, 0), np_dtype), np.empty((0, 0), np_dtype))
    if isinstance(g_spikes, ProductGrad):
        if linear:
            product, g_spikes = (array(g_spikes.nu), _rows(g_spikes.weight, np_dtype)), None
        else:
            g_spikes = g_spikes.dense()
    dense = [_array(g_spikes, np_dtype, 3), _array(grads.mem, np_dtype, 3)]
    arriving = Arriving(_array(grads.active, np_dtype, 1), *dense)
    states = [array(cv), array(ci)]
    g_input = [_array(g_active, np_dtype, 1), _array(nu, np_dtype, 3)]
    params = array(call.params)
    weight = _rows(call.weight if needs.input else None, np_dtype) if impulses else inputs.weight
    events_in = (inputs.indptr, inputs.indices, inputs.values)
    incoming = Incoming(*events_in, weight, in_ptr, in_idx, out_ptr, out_idx)
    recurrence = Recurrence(inputs.rec_weight, inputs.rec_bias, inputs.rec0)
    window = -1.0 if saved.threshold is None else saved.threshold
    derivative = Derivative(window, call.surrogate.code, *call.surrogate.packed)
    calls["cpu", "backward:list" if use_list else "backward:replay"] += 1
    if impulses:
        calls["cpu", "backward:impulses"] += 1
    u, mem = _array(saved.u if use_list else None, np_dtype, 1), _array(saved.mem, np_dtype, 3)

    def run(first: int, last: int) -> list[np.ndarray]:
        def zeros(wanted: bool, *shape: int) -> np.ndarray:
            return np.zeros(shape if wanted else (0,) * len(shape), np_dtype)

        def rows(wanted: bool, count: int) -> np.ndarray:
            out = _aligned(count if wanted else 0, _padded(currents), np_dtype)
            out.fill(0)
            return out

        recurrent = call.rec_weight is not None
        g_weight = rows(needs.weight and train is not None, M)
        g_bias = rows(needs.bias and call.bias is not None, 1)
        g_rec_weight = rows(needs.rec_weight and recurrent, N)
        g_rec_bias = rows(needs.rec_bias and call.rec_bias is not None, 1)
        g_params = np.zeros((len(call.params), N) if want_params else (0, 0))
        outgoing = Outgoing(g_weight, g_bias, *g_input, g_rec_weight, g_rec_bias, _array(g_rec0, np_dtype, 2))
        if impulses:
            backward_impulses(
                *(first, last, T, params[MEM, 0], incoming[:6], active, u, derivative),
                *(arriving[:2], states[0], (rows(True, 1), _aligned(1, weight.shape[1], np_dtype))),
                outgoing[:3],
            )
            return [g_weight, g_bias, g_rec_weight, g_rec_bias, g_params]
        block = rows(True, block_rows(_padded(currents)))
        if use_list:
            code = _code(call)
            backward = backward_linear_kernel(code) if is_linear(code) else backward_active_kernel(code)
            backward(
                *(first, last, T, params, array(call.v0), recurrence.weight, incoming, active, u),
                *(derivative, block, arriving, *states, outgoing),
            )
        else:
            checkpoints = (
                _array(saved.v_checkpoints, np_dtype, 3),
                _array(saved.i_checkpoints, np_dtype, 3),
            )
            start = (first, last, T, derivative, params, checkpoints, inputs.current, inputs.bias)
            if linear:
                backward_replay_linear_kernel(_code(call))(
                    *(*start, mem, incoming, active, arriving, product),
                    *(*states, outgoing, block),
                )
            else:
                _replay(call, np_dtype)(
                    *(*start, recurrence, incoming, active, arriving),
                    *(*states, outgoing, g_params, block),
                )
        return [g_weight, g_bias, g_rec_weight, g_rec_bias, g_params]

    parts = parallel([lambda r=r: run(*r) for r in split(B)])  # type: ignore[misc]
    totals = [_sum(group) for group in zip(*parts, strict=True)]
    weights = [
        torch.from_numpy(_flip(x, np.empty((currents, len(x)), np_dtype))) if x.size else None
        for x in (totals[0], totals[2])
    ]
    biases = [torch.from_numpy(x[0, :currents]) if x.size else None for x in (totals[1], totals[3])]
    grad_input = g_active
    if nu is not None:
        grad_input = nu if train is None else _through(nu, call.weight)  # type: ignore[arg-type]
    return InputGrads(
        grad_input,
        weights[0],
        biases[0],
        weights[1],
        biases[1],
        g_rec0,
        cv if needs.v0 else None,
        ci if needs.i0 and call.i0 is not None else None,
        torch.from_numpy(totals[4].astype(np_dtype)) if totals[4].size else None,
    )


def _are_impulses(call: LayerCall) -> bool:
    """Whether the backward over a list may be that of ``impulses.py``."""
    if not (isinstance(call.spec, NeuronSpec) and is_linear(_code(call))) or call.spec.synapse or not call.N:
        return False
    decays = array(call.params)[MEM]
    return bool((decays == decays[0]).all())


def _adds_less(call: LayerCall, saved: Saved) -> bool:
    """Whether rows of W to add for each active entry cost less than what is done otherwise: to multiply one for each
    active entry of the input, and to sweep a row for each step."""
    if call.train is None or call.train.active is None:
        return True
    assert saved.active is not None
    assert call.weight is not None
    n, m = call.weight.shape
    added, multiplied = saved.active.indices.numel() * m, call.train.active.indices.numel() * n
    return 1.5 * added <= multiplied + call.B * call.T * n


def _needs_replay(spec: NeuronSpec | Equations) -> bool:
    """Whether the adjoint needs the state itself, not only the spikes and the active list."""
    return isinstance(spec, Equations) or (spec.timing == "corrected" and spec.reset == "zero")


def _only_decays(call: LayerCall, grads: OutputGrads, events: tuple[Tensor, Tensor] | None) -> bool:
    """Whether no gradient passes a surrogate, and spikes that reset are known where they matter."""
    spec = call.spec
    if isinstance(spec, Equations):
        return False
    silent = grads.active is None and grads.spikes is None and call.rec_weight is None and not spec.attached
    known = spec.reset in ("none", "subtract") or events is not None
    return silent and known and not _needs_replay(spec)


def _forward(call: LayerCall, dtype: np.dtype) -> Callable[..., Any]:
    if isinstance(call.spec, Equations):
        return forward_of(call, _padded(call.N), dtype)
    return forward_kernel(_code(call), dtype)  # type: ignore[no-any-return]


def _replay(call: LayerCall, dtype: np.dtype) -> Callable[..., Any]:
    if isinstance(call.spec, Equations):
        return backward_of(call, _padded(call.N), dtype)
    return backward_replay_kernel(_code(call))  # type: ignore[no-any-return]


def _replays_linear(call: LayerCall) -> bool:
    return isinstance(call.spec, NeuronSpec) and replays_linear(_code(call), _padded(call.N))


def _keeps_mem(call: LayerCall) -> bool:
    """Whether to keep the membrane after every step for a backward that then has nothing to replay."""
    if not (call.needs_grad and call.save_active) or call.params_grad or call.train is None:
        return False
    if call.train.indices.numel() <= KEEP_MEM_ABOVE * call.T * call.B * call.N or not _replays_linear(call):
        return False
    assert isinstance(call.spec, NeuronSpec)
    return call.spec.reset == "none" or call.spec.timing == "delayed"  # else it is no more what spiked


def _through(nu: Tensor, weight: Tensor) -> Tensor:
    """The gradient of a layer's dense input, ``nu @ weight``."""
    if nu.shape[2] > LARGEST or 2 * nu.shape[2] > weight.shape[1]:
        return nu @ weight
    # of its own: a hook may update the weight as soon as it has its gradient, before the product is made
    return ProductGrad(nu, torch.from_numpy(array(weight).copy()))


def _code(call: LayerCall) -> Code:
    assert isinstance(call.spec, NeuronSpec)
    return encode(call.spec, call.rec_weight is not None)


def _inputs(call: LayerCall, dtype: np.dtype, rows: bool = True) -> Fed:
    current = call.current
    if current is not None:
        still = call.T > 1 and current.stride(0) == 0
        current = (current[:1] if still else current).contiguous()
    indptr = indices = np.empty(0, dtype=np.int32)
    values = np.empty(0, dtype)
    if call.train is not None:
        indptr, indices = array(call.train.indptr), array(call.train.indices)
        values = _array(call.train.values, dtype, 1)
    zeros = np.zeros(call.currents, dtype)
    return Fed(
        _array(current, dtype, 3),
        indptr,
        indices,
        values,
        _transposed(call.weight if rows else None, dtype),
        zeros if call.bias is None else array(call.bias),
        _transposed(call.rec_weight, dtype),
        zeros if call.rec_bias is None else array(call.rec_bias),
        _array(call.rec0, dtype, 2),
    )


# The functions below are numpy and numba on purpose: torch would use its OpenMP threads, which then spin for ms
# on the cores that our threads need (measured: up to twice the time of a step on two cores).


def _is_finite(x: Tensor) -> bool:
    numbers = array(x)
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(numbers.sum()) or np.isfinite(numbers).all())


def _transposed(weight: Tensor | None, dtype: np.dtype) -> np.ndarray:
    """Rows of W^T, contiguous."""
    if weight is None:
        return np.empty((0, 0), dtype)
    n, m = weight.shape
    out = _aligned(m, _padded(n), dtype)
    out[:, n:] = 0
    _flip(array(weight), out)
    return out


def _rows(weight: Tensor | None, dtype: np.dtype) -> np.ndarray:
    """Rows of W in whole vectors."""
    if weight is None:
        return np.empty((0, 0), dtype)
    n, m = weight.shape
    out = _aligned(n, _padded(m), dtype)
    out[:, :m], out[:, m:] = array(weight), 0
    return out


def _copied(x: Tensor | None, shape: tuple[int, ...], dtype: np.dtype) -> Tensor:
    """A copy of ``x`` that a kernel may change, or zeros."""
    return torch.from_numpy(np.zeros(shape, dtype) if x is None else np.array(array(x)))


def _padded(n: int) -> int:
    """The length of a row of ``n`` neurons in whole vectors, so that no loop over it has a remainder."""
    return -(-n // LANES) * LANES


def _aligned(rows: int, columns: int, dtype: np.dtype) -> np.ndarray:
    """Memory from torch, which aligns to cache lines: vectors that lie across two lines take twice the time."""
    return array(torch.empty(rows, columns, dtype=torch.float32 if dtype == np.float32 else torch.float64))


def _flip(x: np.ndarray, out: np.ndarray) -> np.ndarray:
    """``out = x.T``, but for the padding of rows. A weight is too small to be worth waking a thread."""
    transpose(x, 0, x.shape[0], out)
    return out


def _sum(parts: tuple[np.ndarray, ...]) -> np.ndarray:
    total = parts[0]
    for part in parts[1:]:
        total += part
    return total


def _array(x: Tensor | None, dtype: np.dtype, dim: int) -> np.ndarray:
    return np.empty((0,) * dim, dtype) if x is None else array(x)


def _join(parts: Any) -> Tensor:
    parts = list(parts)
    return torch.from_numpy(parts[0].copy() if len(parts) == 1 else np.concatenate(parts))


def _join_ptr(
    ptr: np.ndarray, ranges: list[tuple[int, int]], parts: list[list[Any]], which: int, T: int
) -> Tensor:
    """Turn counts that start anew in every range into one indptr."""
    base = 0
    for (first, last), part in zip(ranges, parts, strict=True):
        if base:
            ptr[first * T + 1 : last * T + 1] += base
        base += part[which].size
        if base > MAX_EVENTS:
            raise InputError(f"more than {MAX_EVENTS} events in one layer; split the batch.")
    return torch.from_numpy(ptr)
