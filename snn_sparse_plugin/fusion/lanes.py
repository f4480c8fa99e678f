"""Running lanes: all calls at once, or one by one where they feed back into themselves."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters import running
from ..core.config import use_config
from ..core.errors import FusionError, NonFiniteError
from ..core.spikes import SpikeTrain
from . import meter
from .columns import Column
from .context import in_mode
from .executor import FusedCall, Synapses
from .planner import Plan
from .record import FunctionLane, InputLane, Lane, NeuronLane, StackLane, backoff
from .recordable import BATCHED, LINEAR, filled
from .series import Series, constant_of, piece, stacked, train_of
from .stepping import Flow, Layer

SHORT = 2
"""Records in a row in which a neuron was asked for a single step, after which it is stepped for a while."""
FIRST_PAUSE, LONGEST_PAUSE = 64, 4096
"""Calls for which it is not recorded: each time twice as many."""


def run_lane(lane: Lane, plan: Plan) -> None:
    """Compute the results of a lane whose arguments are all there."""
    if lane in plan.inside:
        return
    if isinstance(lane, NeuronLane):
        # a single step is upstream's own, unless the module has changed since
        if (len(lane) == 1 and lane.description.holds()) or not _run_neuron(lane, plan):
            note_length(lane.module, len(lane))
            run_steps([lane], plan)
        else:
            note_length(lane.module, len(lane))
    elif isinstance(lane, FunctionLane):
        if isinstance(lane, InputLane):
            note_length(lane.kwargs["module"], len(lane))
        lane.results[0] = _run_function(lane, plan)


def _run_function(lane: FunctionLane, plan: Plan) -> Series:
    n = len(lane)
    if isinstance(lane, InputLane):
        return _inputs(lane)
    if isinstance(lane, StackLane):
        return Series(1, pieces=[_stack_of_steps(lane, plan)])
    if n == 1:
        return Series(1, pieces=[plan.call(lane, [piece(column[0]) for column in lane.columns], 0)])
    constants = [constant_of(column) for column in lane.columns]
    if all(x is not None for x in constants):
        return Series(n, constant=plan.call(lane, constants, 0))
    tensors = [stacked(column) if x is None else x for column, x in zip(lane.columns, constants, strict=True)]
    varying = [x is None for x in constants]
    return Series(n, dense=_over_time(lane, tensors, varying, n))


def _inputs(lane: InputLane) -> Series:
    """Plain inputs: the one that is there at every step, the tensor or the events that they are slices of."""
    column = lane.columns[0]
    n, constant = len(column), constant_of(column)
    if constant is not None:
        return Series(n, constant=constant)
    train = train_of(column)
    if train is not None:
        return Series(n, train=train)
    dense = stacked(column)
    if lane.begun is not None:
        dense._snn_begun = lane.begun  # type: ignore[attr-defined]  # for SpikeTrain.from_dense
    return Series(n, dense=dense)


def _over_time(lane: FunctionLane, tensors: list[Tensor], varying: list[bool], n: int) -> Tensor:
    """The function on all steps together: (n, ...)."""
    if lane.func is LINEAR and varying[0] and not any(varying[1:]):
        return Plan.call(lane, tensors, 0)
    kwargs = lane.kwargs
    if (
        lane.func in BATCHED
        and varying[0]
        and not any(varying[1:])
        and len(lane.shape) == tensors[0].dim() - 1
    ):
        flat = [tensors[0].flatten(0, 1), *tensors[1:]]
        if tensors[0].dim() == _batched_dims(lane):
            return Plan.call(lane, flat, 0).unflatten(0, tensors[0].shape[:2])

    def step(*given: Tensor) -> Any:
        found = iter(given)
        filled_in = [next(found) if v else x for x, v in zip(tensors, varying, strict=True)]
        named = {name: filled(form, filled_in) for name, form in kwargs.items()}
        return lane.func(*filled(lane.args, filled_in), **named)

    over = [x for x, v in zip(tensors, varying, strict=True) if v]
    try:
        return torch.vmap(step)(*over)
    except (RuntimeError, ValueError):  # no rule for it: call by call
        return torch.stack([step(*x) for x in zip(*(x.unbind(0) for x in over), strict=True)])


def _batched_dims(lane: FunctionLane) -> int:
    """Dimensions of (T, B, C, ...) for a layer whose name says how many are spatial."""
    name = getattr(lane.func, "__name__", "")
    return 3 + next((int(c) for c in name if c.isdigit()), 9)


def _stack_of_steps(lane: StackLane, plan: Plan) -> Tensor:
    """``torch.stack`` of successive values of one result: they stand together already, unless they were made singly."""
    (made, start, slot), n = lane.steps[0], len(lane.steps)
    series = made.results[slot]
    if series.pieces is not None or series.constant is not None:
        return torch.stack([series.step(call) for call in range(start, start + n)])
    dense: Tensor = series.stacked(start, n)
    # another owner of this memory would see what is done to it in place
    alone = plan.readers[made, slot] == {lane} and (made, slot) not in plan.waiting
    return dense if alone and start == 0 and n == series.n else dense.clone()


def _run_neuron(lane: NeuronLane, plan: Plan) -> bool:
    """One call of the fused op for all steps; False where only single steps do what upstream does."""
    membrane = lane.slots.get(lane.adapter.membrane_leaf(), -1)
    if plan.wants_currents(lane):
        return False
    column, synapses, name = lane.columns[0], None, type(lane.module).__name__
    source = column.range()
    if source is not None and source[0] in plan.inside:
        linear, start = source[0], source[1]
        column = linear.columns[0][start : start + len(lane)]
        rest = [c[0][0] for c in linear.columns[1:]]
        synapses = Synapses(rest[0], rest[1] if len(rest) > 1 else None)
        name = f"Linear→{name}"
    (flow, once), n = _flow(column), len(lane)
    single = len(lane.input_shape) == 1
    if single:
        flow = (flow.to_dense() if isinstance(flow, SpikeTrain) else flow).unsqueeze(1)
    leaves = _initial(lane)
    if single:
        leaves = {k: v if v is None or not v.dim() else v.unsqueeze(0) for k, v in leaves.items()}
    call = FusedCall(
        Layer(name, lane.module, lane.adapter),
        lane.neuron,
        synapses,
        name,
        lane.adapter.state_of(leaves, lane.like),
        per_step=True,
        last=plan.is_last(lane),
        config=lane.config,
        steps=n if once else None,
    )
    events = plan.wants_events(lane) and not single
    want_mem = membrane > 0 and (lane, membrane) in plan.early
    try:
        passed = _fused(lane, call, flow, synapses, column, events, want_mem)
    except NonFiniteError:  # which upstream's own steps carry on
        return False
    if passed is None:
        return False
    spikes, mem = passed.flow, passed.mem
    if single:
        assert isinstance(spikes, Tensor)
        spikes, mem = spikes.squeeze(1), None if mem is None else mem.squeeze(1)
    lane.results[0] = Series(n, train=spikes) if isinstance(spikes, SpikeTrain) else Series(n, dense=spikes)
    for leaf, x in lane.adapter.leaves(passed.state).items():
        slot = lane.slots[leaf]
        if slot:
            last = x.squeeze(0) if single else x
            lane.results[slot] = Series(n, dense=mem if slot == membrane else None, last=last)
    return True


def _fused(
    lane: NeuronLane,
    call: FusedCall,
    flow: Flow,
    synapses: Synapses | None,
    column: Column,
    events: bool,
    want_mem: bool,
) -> Any:
    with use_config(lane.config):
        if meter.current is None:
            return call.run(flow, events, want_mem)
        x, state = piece(lane.columns[0][0]) if synapses is None else piece(column[0]), _initial(lane)
        return meter.current.add(
            lane.module,
            len(lane),
            lambda: call.run(flow, events, want_mem),
            lambda: _one_step(lane, synapses, x, state),
            (lane.input_shape, synapses is None, lane.mode),
        )


def _one_step(lane: NeuronLane, synapses: Synapses | None, x: Tensor, state: Any) -> None:
    """A single step as upstream runs it, for the meter."""
    if synapses is not None:
        x = F.linear(x, *synapses)
    with use_config(None):
        lane.adapter.upstream_step(lane.upstream, lane.module, x, state, lane.like)


def _flow(column: Column) -> tuple[Flow, bool]:
    """All steps of a column, or the one that it holds at every step and True."""
    source = column.range()
    lane, start = source[:2] if source is not None else (None, 0)
    if isinstance(lane, InputLane) and len(column) < len(lane):
        # one of several loops in the record: what it read may be events or slices, the inputs of all loops are not
        column = lane.columns[0][start : start + len(column)]
    constant = constant_of(column)
    if constant is not None:
        return constant.unsqueeze(0), True
    train = train_of(column)
    return (stacked(column) if train is None else train), False


def _initial(lane: NeuronLane) -> dict[str, Tensor | None]:
    return {name: None if entry is None else piece(entry) for name, entry in lane.initial.items()}


def note_length(module: nn.Module, steps: int) -> None:
    """Stop recording a module for a while that is always asked for single steps."""
    if steps > 1:
        backoff.pop(module, None)
        return
    found = backoff.setdefault(module, [0, 0, FIRST_PAUSE])
    found[0] += 1
    if found[0] >= SHORT:
        found[1] = found[2]
        found[2] = min(LONGEST_PAUSE, 2 * found[2])


# --- one call after the other ---


def run_steps(group: list[Lane], plan: Plan) -> None:
    """The calls of these lanes in the order of the loop, each neuron by upstream's own forward."""
    states: dict[Lane, dict[str, Tensor | None]] = {}
    pieces: dict[Lane, list[list[Tensor]]] = {}
    for lane in group:
        pieces[lane] = [[] for _ in lane.results]
        lane.results[:] = [Series(len(lane), pieces=made) for made in pieces[lane]]
    todo = sorted(
        ((number, call, lane) for lane in group for call, number in enumerate(lane.order)), key=lambda x: x[0]
    )
    for _, call, lane in todo:
        with in_mode(lane.mode):
            _run_step(lane, call, plan, states, pieces)


def _run_step(
    lane: Lane,
    call: int,
    plan: Plan,
    states: dict[Lane, dict[str, Tensor | None]],
    pieces: dict[Lane, list[list[Tensor]]],
) -> None:
    tensors = [plan.piece(column[call]) for column in lane.columns]
    if isinstance(lane, StackLane):
        pieces[lane][0].append(torch.stack([plan.piece(entry) for entry in lane.steps]))
        return
    if isinstance(lane, FunctionLane):
        pieces[lane][0].append(plan.call(lane, tensors, call))
        return
    assert isinstance(lane, NeuronLane)
    if not lane.description.holds():
        raise FusionError(
            f"{type(lane.module).__name__} was changed after its step was recorded at {lane.where}, before the "
            f"result was used. Use the result first, or switch time fusion off (fuse_time=False)."
        )
    before = states[lane] if lane in states else _initial(lane)
    with use_config(lane.config), running(lane.module):
        out, after = lane.adapter.upstream_step(lane.upstream, lane.module, tensors[0], before, lane.like)
    states[lane] = dict(after)
    pieces[lane][0].append(out)
    for name, slot in lane.slots.items():
        if slot:
            pieces[lane][slot].append(after[name])
