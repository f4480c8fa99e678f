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

from ...core.backend import CHUNK, InputGrads, LayerBackward, LayerCall, OutputGrads, Saved, calls, passed_on
from ...core.equations import Equations
from ..product import LARGEST, ProductGrad
from .arguments import Outgoing, Recurrence
from .backward import backward_active_kernel
from .backward_arrays import Left, Shared, Sums, allocated, room, shared_of
from .impulses import backward_impulses
from .layout import (
    aligned,
    are_small,
    array_or_empty,
    numpy_type,
    padded,
    ranges_of,
    zero_rows,
)
from .linear import LINEAR_ROWS, backward_linear_kernel, is_linear
from .memory import array
from .outgoing import block_rows
from .program_backward import backward_of
from .replay import backward_replay_kernel
from .replay_linear import ADJOINT, OWN_ROWS, backward_replay_linear_kernel
from .rows import MEM
from .spiking_layer import code_of
from .surrogate import row_kernel
from .threads import in_stages
from .way import Way, empty_list, only_decays, way_of
from .weights import flip

LISTED, REPLAYED = 1.0, 3.0
"""Time of a backward over the list, and of one that replays, by that of the forward."""


class _Ready(NamedTuple):
    """A layer whose kernel may run. ``passed``: the gradient of its input, which the kernel fills; None where none is
    wanted, or one is made in the end of what the kernel leaves."""

    layer: LayerBackward
    way: Way
    left: Left
    shared: Shared
    passed: Tensor | None


def run_backward(layers: Sequence[LayerBackward], grads: OutputGrads) -> list[InputGrads]:
    """Layers of which each took the events of the one before; ``grads`` arrive at the last.

    As many as possible run on each range of samples one after the other: until numbers of all are asked for, or they
    are large.
    """
    found: list[InputGrads] = []  # the last layer's first
    together: list[_Ready] = []
    for k in range(len(layers) - 1, -1, -1):
        layer, way = _with_way(layers[k], grads)
        multiplies = isinstance(grads.spikes, ProductGrad) and not way.linear
        if together and (
            multiplies or not are_small([layer.call, *(ready.layer.call for ready in together)])
        ):
            _run(together, found)
            together = []
        together.append(_ready(layer, way, grads, used_here=k > 0))
        passed = together[-1].passed
        if k and passed is None:
            _run(together, found)
            together, passed = [], found[-1].input
        if k:
            assert passed is not None
            grads = passed_on(layers[k - 1].saved, passed)
    _run(together, found)
    return found[::-1]


def _with_way(layer: LayerBackward, grads: OutputGrads) -> tuple[LayerBackward, Way]:
    """Which kernel runs; of a layer that only decays, on an empty list."""
    call, saved, events, needs = layer
    if only_decays(call, saved, events, grads, needs):
        saved = empty_list(call)
        layer = layer._replace(saved=saved)
    return layer, way_of(call, saved, grads, needs)


def _ready(layer: LayerBackward, way: Way, grads: OutputGrads, used_here: bool) -> _Ready:
    """``used_here``: the gradient of its input is for a layer that follows at once."""
    call, needs = layer.call, layer.needs
    left = allocated(call, way, grads, needs)
    shared = shared_of(layer, grads, way, left)
    calls["cpu", "backward:list" if way.by_list else "backward:replay"] += 1
    if way.impulses:
        calls["cpu", "backward:impulses"] += 1
    passed = left.active
    if left.nu is not None:
        passed = left.nu if call.train is None else _product(left.nu, call.weight, used_here)  # type: ignore[arg-type]
    return _Ready(layer, way, left, shared, passed)


def _run(together: list[_Ready], found: list[InputGrads]) -> None:
    """The kernels of layers, the last layer's first. Of what they find only the last gradient of an input is kept, as
    the others have been used."""
    made = _run_ranges(together)
    found += made
    for k in range(max(0, len(found) - len(made) - 1), len(found) - 1):
        found[k] = found[k]._replace(input=None)


def _run_ranges(together: list[_Ready]) -> list[InputGrads]:
    costs = [LISTED if ready.way.by_list else REPLAYED for ready in together]
    ranges = ranges_of([ready.layer.call for ready in together], costs)
    if len(ranges) == 1:
        return [_run_alone(ready, *ranges) for ready in together]
    rooms = [[room(ready.layer.call, ready.layer.needs) for _ in ranges] for ready in together]
    # what kernels are given is made before another thread is woken: two that take turns at Python wait for each other
    stages: list[Callable[[int, None], None]] = []
    for ready, parts in zip(together, rooms, strict=True):
        tasks = [_tasks(ready, part, samples) for part, samples in zip(parts, ranges, strict=True)]
        stages.append(partial(_stage, tasks))
    found = in_stages(range(len(ranges)), stages, lambda k, *_: _collected(together[k], rooms[k]))
    return [_with_product(ready, grads) for ready, grads in zip(together, found, strict=True)]


def _stage(tasks: list[list[Callable[[], None]]], at: int, _: None) -> None:
    _in_turn(tasks[at])


def _run_alone(ready: _Ready, samples: tuple[int, int]) -> InputGrads:
    """On this thread, with all samples."""
    sums = room(ready.layer.call, ready.layer.needs)
    _in_turn(_tasks(ready, sums, samples))
    return _with_product(ready, _collected(ready, [sums]))


def _in_turn(tasks: list[Callable[[], None]]) -> None:
    for task in tasks:
        task()


# --- one range of samples ---


def _tasks(ready: _Ready, sums: Sums, samples: tuple[int, int]) -> list[Callable[[], None]]:
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
        _, code, *parameters = shared.derivative
        row = row_kernel(code)
        tasks.append(partial(row, code, *parameters, -1.0, shared.u[entries], shared.phi[entries]))
    return [*tasks, task]


def _clear(sums: Sums) -> None:
    sums.all_rows.fill(0)  # on the thread that adds to them, in whose cache they are then
    sums.params.fill(0)


def _impulses(
    call: LayerCall, shared: Shared, outgoing: Outgoing, samples: tuple[int, int, int]
) -> Callable[[], None]:
    dtype, width = shared.incoming.weight.dtype, shared.incoming.weight.shape[1]
    return partial(
        backward_impulses,
        *(*samples, shared.params[MEM, 0], shared.incoming[:6], shared.active, shared.phi),
        *(shared.arriving[:2], shared.states[0]),
        (zero_rows(1, call.currents, dtype), aligned(1, width, dtype)),
        *(outgoing[:3], np.empty((3, call.T + 1), dtype)),
    )


def _list(
    call: LayerCall, shared: Shared, outgoing: Outgoing, samples: tuple[int, int, int]
) -> Callable[[], None]:
    code = code_of(call)
    return partial(
        backward_linear_kernel(code) if is_linear(code) else backward_active_kernel(code),
        *(*samples, shared.params, array(call.v0), shared.inputs.rec_weight, shared.incoming, shared.active),
        *(shared.u, shared.phi, _block(call, samples), shared.arriving, *shared.states, outgoing),
        zero_rows(LINEAR_ROWS, call.currents, numpy_type(call.v0.dtype)),
    )


def _replay(
    call: LayerCall,
    saved: Saved,
    way: Way,
    shared: Shared,
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
        block = _block(call, samples, ADJOINT)
        return partial(
            backward_replay_linear_kernel(code_of(call)),
            *(*start, shared.mem, shared.incoming, shared.active, shared.arriving, shared.product),
            *(*shared.states, outgoing, block, block.reshape(-1), zero_rows(OWN_ROWS, call.currents, dtype)),
        )
    recurrence = Recurrence(inputs.rec_weight, inputs.rec_bias, inputs.rec0)
    return partial(
        _replay_kernel(call, dtype),
        *(*start, recurrence, shared.incoming, shared.active, shared.arriving),
        *(*shared.states, outgoing, g_params, _block(call, samples)),
    )


def _replay_kernel(call: LayerCall, dtype: np.dtype) -> Callable[..., Any]:
    if isinstance(call.spec, Equations):
        return backward_of(call, padded(call.N), dtype)
    return backward_replay_kernel(code_of(call))  # type: ignore[no-any-return]


def _block(call: LayerCall, samples: tuple[int, int, int], more: int = 0) -> np.ndarray:
    """Room for the gradients of the currents of a few steps, of samples first..last and T steps of each; and for some
    rows more."""
    _, last, T = samples
    width = padded(call.currents)
    rows = min(block_rows(width), max(CHUNK, last * T))  # where all fit, one block is delivered
    block = aligned(rows + more, width, numpy_type(call.v0.dtype))
    block[:, call.currents :] = 0  # kernels write to the rest before they read it
    return block


# --- what comes back ---


def _collected(ready: _Ready, parts: list[Sums]) -> InputGrads:
    """``parts``: what each range left, which is added in order and in place of the first; that of the last range in
    one go with what is done to the sum."""
    (call, _, _, needs), _, left, _, passed = ready
    sums, *others = parts
    for part in others[:-1]:
        np.add(sums.all_rows, part.all_rows, out=sums.all_rows)
    more = others[-1] if others else _NO_MORE
    for part in others:
        np.add(sums.params, part.params, out=sums.params)
    return InputGrads(
        passed,
        _weight(sums.weight, more.weight, call.currents),
        _bias(sums.bias, more.bias, call.currents),
        _weight(sums.rec_weight, more.rec_weight, call.currents),
        _bias(sums.rec_bias, more.rec_bias, call.currents),
        None if left.rec0 is None else torch.from_numpy(left.rec0),
        torch.from_numpy(left.v) if needs.v0 else None,
        torch.from_numpy(left.i) if needs.i0 and call.i0 is not None else None,
        torch.from_numpy(sums.params.astype(numpy_type(call.v0.dtype))) if sums.params.size else None,
    )


def _with_product(ready: _Ready, grads: InputGrads) -> InputGrads:
    """The gradient of the input as well, where the library makes it, with threads of its own."""
    call, nu = ready.layer.call, ready.left.nu
    if ready.passed is not None or nu is None:
        return grads
    return grads._replace(input=nu @ call.weight)  # type: ignore[operator]


_NO_MORE = Sums(*[None] * len(Sums._fields))  # type: ignore[arg-type]


def _weight(rows: np.ndarray, more: np.ndarray | None, currents: int) -> Tensor | None:
    """The gradient of W from rows of W^T."""
    if not rows.size:
        return None
    # aligned, as each of its vectors would lie across two lines: a fifth of the time
    return torch.from_numpy(flip(rows, aligned(currents, len(rows), rows.dtype), more))


def _bias(row: np.ndarray, more: np.ndarray | None, currents: int) -> Tensor | None:
    if not row.size:
        return None
    row = row[0, :currents]
    return torch.from_numpy(row.copy() if more is None else row + more[0, :currents])


def _product(nu: Tensor, weight: Tensor, used_here: bool) -> Tensor | None:
    """The gradient of a layer's dense input, ``nu @ weight``, if it is to be multiplied by whoever takes it."""
    # see LARGEST; a kernel multiplies six rows at a time, and each sample in one thread
    T, B, K = nu.shape
    if K > LARGEST and (T < 4 or torch.get_num_threads() > B or nu.dtype != torch.float32):
        return None
    # a weight of its own: a hook may update it as soon as it has its gradient, before the product is made
    return ProductGrad(nu, weight.detach() if used_here else torch.from_numpy(array(weight).copy()))
