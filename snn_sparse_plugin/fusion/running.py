"""Running nodes: all calls at once, or one by one where they feed back into themselves."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..adapters import running
from ..core.config import use_config
from ..core.errors import FusionError
from .context import in_mode
from .convolutions import pooled_events
from .layers import flow_of, initial_of, run_neuron
from .nodes import FunctionNode, InputNode, NeuronNode, Node, StackNode, WriteNode
from .planner import Plan
from .recordable import BATCHED, LINEAR, batched_dims, filled
from .series import Series, constant_of, piece, stacked, train_of


def run_node(node: Node, plan: Plan) -> None:
    """Compute the results of a node whose arguments are all there."""
    if node in plan.inside or node.results[0] is not None:  # it has run within another, or with one before it
        return
    if isinstance(node, NeuronNode):
        # a single step is upstream's own, unless the module has changed since
        if (len(node) == 1 and node.description.holds(node.module)) or not run_neuron(node, plan):
            run_steps([node], plan)
    elif isinstance(node, FunctionNode):
        node.results[0] = _run_function(node, plan)


def _run_function(node: FunctionNode, plan: Plan) -> Series:
    n = len(node)
    if isinstance(node, InputNode):
        return _inputs(node)
    if isinstance(node, StackNode):
        return Series(1, pieces=[_stack_of_steps(node, plan)])
    convolved = _convolved(node, plan)
    if convolved is not None:
        return Series(n, dense=convolved)
    if n == 1:
        return Series(1, pieces=[plan.call(node, [piece(argument[0]) for argument in node.arguments], 0)])
    pool, reshapes = plan.spike_pools.get(node), plan.reshapes(node)
    train = train_of(node.arguments[0]) if reshapes or pool is not None else None
    if train is not None:
        kept = train.view(*node.shape[1:]) if reshapes else pooled_events(train, pool)
        if kept is not None:
            return Series(n, train=kept)
    constants = [constant_of(argument) for argument in node.arguments]
    if all(x is not None for x in constants):
        return Series(n, constant=plan.call(node, constants, 0))
    tensors = [
        stacked(argument) if x is None else x for argument, x in zip(node.arguments, constants, strict=True)
    ]
    varying = [x is None for x in constants]
    return Series(n, dense=_over_time(node, tensors, varying, n))


def _convolved(node: FunctionNode, plan: Plan) -> Tensor | None:
    """Over all steps (n, ...) what a convolution of spikes makes, or batch norm and pool behind it; None for any other
    node."""
    of: Node = node
    pool = plan.pooled.get(of)
    of = of if pool is None else of.arguments[0].read()[0][0]
    norm = plan.normed.get(of)
    of = of if norm is None else of.arguments[0].read()[0][0]
    found = plan.convolved.get(of)
    if found is None:
        return None
    flow, once = flow_of(of.arguments[0])
    with use_config(plan.config):
        out = found.run(flow, norm, pool, "Conv")
    return out.expand(len(node), *out.shape[1:]) if once else out


def _inputs(node: InputNode) -> Series:
    """Plain inputs: the one that is there at every step, the tensor or the events that they are slices of."""
    argument = node.arguments[0]
    n, constant = len(argument), constant_of(argument)
    if constant is not None:
        return Series(n, constant=constant)
    train = train_of(argument)
    if train is not None:
        return Series(n, train=train)
    dense = stacked(argument)
    if node.begun is not None:
        dense._snn_begun = node.begun  # type: ignore[attr-defined]  # for SpikeTrain.from_dense
    return Series(n, dense=dense)


def _over_time(node: FunctionNode, tensors: list[Tensor], varying: list[bool], n: int) -> Tensor:
    """The function on all steps together: (n, ...)."""
    if node.func is LINEAR and varying[0] and not any(varying[1:]):
        return Plan.call(node, tensors, 0)
    kwargs = node.kwargs
    # a batch norm by running statistics always has samples; vmap would round it in another way
    batched = node.func is F.batch_norm or (
        node.func in BATCHED and tensors[0].dim() == batched_dims(node.func)
    )
    if batched and varying[0] and not any(varying[1:]) and len(node.shape) == tensors[0].dim() - 1:
        flat = [tensors[0].flatten(0, 1), *tensors[1:]]
        return Plan.call(node, flat, 0).unflatten(0, tensors[0].shape[:2])

    def step(*given: Tensor) -> Any:
        found = iter(given)
        filled_in = [next(found) if v else x for x, v in zip(tensors, varying, strict=True)]
        named = {name: filled(form, filled_in) for name, form in kwargs.items()}
        return node.func(*filled(node.args, filled_in), **named)

    over = [x for x, v in zip(tensors, varying, strict=True) if v]
    try:
        return torch.vmap(step)(*over)
    except (RuntimeError, ValueError):  # no rule for it: call by call
        return torch.stack([step(*x) for x in zip(*(x.unbind(0) for x in over), strict=True)])


def _stack_of_steps(node: StackNode, plan: Plan) -> Tensor:
    """``torch.stack`` of successive values of one result: they stand together already, unless they were made singly."""
    (made, start, slot), n = node.steps[0], len(node.steps)
    series = made.results[slot]
    if series.pieces is not None or series.constant is not None:
        return torch.stack([series.step(call) for call in range(start, start + n)])
    dense: Tensor = series.stacked(start, n)
    # another reader of this memory would see what is done to it in place; steps in the user's hands have their own
    alone = plan.readers[made, slot] == {node}
    return dense if alone and start == 0 and n == series.n else dense.clone()


# --- one call after the other ---


def run_steps(group: list[Node], plan: Plan) -> None:
    """The calls of these nodes in the order of the loop, each neuron by upstream's own forward."""
    states: dict[Node, dict[str, Tensor | None]] = {}
    pieces: dict[Node, list[list[Tensor]]] = {}
    for node in group:
        pieces[node] = [[] for _ in node.results]
        node.results[:] = [Series(len(node), pieces=made) for made in pieces[node]]
    todo = sorted(
        ((number, call, node) for node in group for call, number in enumerate(node.order)), key=lambda x: x[0]
    )
    for _, call, node in todo:
        with in_mode(node.mode):
            _run_step(node, call, plan, states, pieces)


def _run_step(
    node: Node,
    call: int,
    plan: Plan,
    states: dict[Node, dict[str, Tensor | None]],
    pieces: dict[Node, list[list[Tensor]]],
) -> None:
    if isinstance(node, WriteNode):  # in the end
        return
    tensors = [plan.piece(argument[call]) for argument in node.arguments]
    if isinstance(node, StackNode):
        pieces[node][0].append(torch.stack([plan.piece(entry) for entry in node.steps]))
        return
    if isinstance(node, FunctionNode):
        pieces[node][0].append(plan.call(node, tensors, call))
        return
    assert isinstance(node, NeuronNode)
    if not node.description.holds(node.module):
        raise FusionError(
            f"{type(node.module).__name__} was changed after its step was recorded at {node.where}, before the "
            f"result was used. Use the result first, or switch time fusion off (fuse_time=False)."
        )
    before = states[node] if node in states else initial_of(node)
    with use_config(node.config), running(node.module):
        out, after = node.adapter.upstream_step(node.upstream, node.module, tensors[0], before, node.like)
    states[node] = dict(after)
    pieces[node][0].append(out)
    for name, slot in node.slots.items():
        if slot:
            pieces[node][slot].append(after[name])
