"""Neurons of a record: all steps of one as a call of the op, and of several that follow each other as one node."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..adapters import running
from ..adapters.counting import record_of
from ..core import tally
from ..core.config import use_config
from ..core.errors import InputError, NonFiniteError
from ..core.once import made_once
from ..core.spikes import SpikeTrain
from ..ops.spiking_layer.prepared import Step, run_chain
from . import meter
from .arguments import ArgumentSeries
from .fused import Begun, FusedCall, Synapses
from .nodes import InputNode, NeuronNode
from .planner import Plan
from .series import Series, constant_of, piece, stacked, train_of
from .stepping import Flow, Layer, Passed


class _Asked(NamedTuple):
    """How the call of a neuron is asked for."""

    call: FusedCall
    argument: ArgumentSeries  # what enters it, or the linear layer inside
    synapses: Synapses | None
    events: bool
    want_mem: bool
    single: bool  # samples without a batch


def run_neuron(node: NeuronNode, plan: Plan) -> bool:
    """All steps at once, and with them those of the neurons that follow it; False where only single steps do what
    upstream does."""
    if plan.wants_currents(node):
        return False
    nodes = _followed(node, plan)
    try:
        if len(nodes) > 1 and _run_chain(nodes, plan):
            return True
    except InputError:  # each by itself, to be told which
        pass
    try:
        return _run_alone(node, plan)
    except NonFiniteError:  # which upstream's own steps carry on
        return False


def _run_alone(node: NeuronNode, plan: Plan) -> bool:
    asked = _asked(node, plan)
    flow, once = flow_of(asked.argument)
    if asked.single:
        flow = (flow.to_dense() if isinstance(flow, SpikeTrain) else flow).unsqueeze(1)
    asked.call.steps = len(node) if once else None
    passed = _fused(node, asked, flow)
    if passed is None:
        return False
    _note(node, asked, passed)
    return True


def _asked(node: NeuronNode, plan: Plan) -> _Asked:
    membrane = node.slots.get(node.adapter.membrane_leaf(), -1)
    argument, synapses, name = node.arguments[0], None, type(node.module).__name__
    source = argument.range()
    if source is not None and source[0] in plan.inside:
        linear, start = source[0], source[1]
        argument = linear.arguments[0][start : start + len(node)]
        rest = [c[0][0] for c in linear.arguments[1:]]
        synapses = Synapses(rest[0], rest[1] if len(rest) > 1 else None)
        name = f"Linear→{name}"
    single = len(node.input_shape) == 1
    leaves = initial_of(node)
    if single:
        leaves = {k: v if v is None or not v.dim() else v.unsqueeze(0) for k, v in leaves.items()}
    call = FusedCall(
        Layer(name, node.module, node.adapter),
        node.neuron,
        synapses,
        name,
        node.adapter.state_of(leaves, node.like),
        per_step=True,
        last=plan.is_last(node),
        config=node.config,
        half=node.half,
    )
    want_mem = membrane > 0 and (node, membrane) in plan.early
    return _Asked(call, argument, synapses, plan.wants_events(node) and not single, want_mem, single)


def _note(node: NeuronNode, asked: _Asked, passed: Passed) -> None:
    """Put what a call made into the node."""
    n, single, spikes, mem = len(node), asked.single, passed.flow, passed.mem
    membrane = node.slots.get(node.adapter.membrane_leaf(), -1)
    if single:
        assert isinstance(spikes, Tensor)
        spikes, mem = spikes.squeeze(1), None if mem is None else mem.squeeze(1)
    node.results[0] = Series(n, train=spikes) if isinstance(spikes, SpikeTrain) else Series(n, dense=spikes)
    for leaf, x in node.adapter.leaves(passed.state).items():
        slot = node.slots[leaf]
        if slot:
            last = x.squeeze(0) if single else x
            node.results[slot] = Series(n, dense=mem if slot == membrane else None, last=last)


def _fused(node: NeuronNode, asked: _Asked, flow: Flow) -> Any:
    call, events, want_mem = asked.call, asked.events, asked.want_mem
    with use_config(node.config):
        if meter.current is None:
            return call.run(flow, events, want_mem)
        x = piece(node.arguments[0][0]) if asked.synapses is None else piece(asked.argument[0])
        state = initial_of(node)
        return meter.current.add(
            node.module,
            len(node),
            lambda: call.run(flow, events, want_mem),
            lambda: _one_step(node, asked.synapses, x, state),
            (node.input_shape, asked.synapses is None, node.mode),
        )


def _one_step(node: NeuronNode, synapses: Synapses | None, x: Tensor, state: Any) -> None:
    """A single step as upstream runs it, for the meter."""
    if synapses is not None:
        x = F.linear(x, *synapses)
    with use_config(None):
        node.adapter.upstream_step(node.upstream, node.module, x, state, node.like)


def flow_of(argument: ArgumentSeries) -> tuple[Flow, bool]:
    """All steps of an argument, or the one that it holds at every step and True."""
    source = argument.range()
    node, start = source[:2] if source is not None else (None, 0)
    if isinstance(node, InputNode) and len(argument) < len(node):
        # one of several loops in the record: what it read may be events or slices, the inputs of all loops are not
        argument = node.arguments[0][start : start + len(argument)]
    constant = constant_of(argument)
    if constant is not None:
        return constant.unsqueeze(0), True
    train = train_of(argument)
    return (stacked(argument) if train is None else train), False


def initial_of(node: NeuronNode) -> dict[str, Tensor | None]:
    return {name: None if entry is None else piece(entry) for name, entry in node.initial.items()}


# --- several, one after the other ---


def _followed(node: NeuronNode, plan: Plan) -> list[NeuronNode]:
    """The node, and those of which each reads, through a linear layer of its own, all that the one before emits."""
    found = [node]
    while len(node.input_shape) == 2 and (following := _following(found[-1], plan)) is not None:
        found.append(following)
    return found


def _following(node: NeuronNode, plan: Plan) -> NeuronNode | None:
    membrane = node.slots.get(node.adapter.membrane_leaf(), -1)
    linear = _only_reader(node, plan)
    if linear not in plan.inside or (node, membrane) in plan.early or not plan.wants_events(node):
        return None
    other = _only_reader(linear, plan)  # type: ignore[arg-type]
    if not isinstance(other, NeuronNode) or other.neuron.recurrent or plan.wants_currents(other):
        return None
    begins_new = all(entry is None or len(entry) == 2 for entry in other.initial.values())
    in_step = len(node) == len(linear) == len(other) > 1 and node.mode == other.mode  # type: ignore[arg-type]
    whole = linear.arguments[0].range() == (node, 0, 0) and other.arguments[0].range() == (linear, 0, 0)  # type: ignore[union-attr]
    return other if begins_new and in_step and whole else None


def _only_reader(node: Any, plan: Plan) -> Any:
    readers = plan.readers.get((node, 0), set())
    return next(iter(readers)) if len(readers) == 1 else None


def _run_chain(nodes: list[NeuronNode], plan: Plan) -> bool:
    """Several neurons as one node of the graph; False where each has to be run by itself."""
    if meter.current is not None or tally.watchers.get() is not None:
        return False
    asked = [_asked(node, plan) for node in nodes]
    flow, once = flow_of(asked[0].argument)
    if once:
        return False
    entering, begun = flow, list[Begun]()
    for node, each in zip(nodes, asked, strict=True):
        with use_config(node.config):
            begin = each.call.begin(entering, each.events, each.want_mem)
        last = node is nodes[-1]
        if begin is None or begin.half is not None or node.neuron.output is not None:
            return False
        passes = begin.ready.pattern.want_events and node.neuron.surrogate.kind != "zero"
        if not last and (begin.ready.asked.return_mem or not passes):
            return False
        begun.append(begin)
        layout = begin.ready.layout
        shape = (layout.T, layout.B, *layout.features)
        entering = _stand_in(shape, begin.ready.wanted, layout.device)
    steps = [
        Step(b.ready, b.synapses, node.neuron.params, b.start, record_of(node.module))
        for node, b in zip(nodes, begun, strict=True)
    ]
    outs = run_chain(begun[0].flow, steps, shown=True)
    for node, each, begin, out in zip(nodes, asked, begun, outs, strict=True):
        with running(node.module):
            _note(node, each, each.call.end(begin, out))
    return True


@made_once(64)
def _stand_in(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> SpikeTrain:
    """Events of the form that a call will emit; nobody looks at them."""
    none = torch.empty(0, dtype=torch.int32, device=device)
    return SpikeTrain._of_events((none, none), shape, dtype)
