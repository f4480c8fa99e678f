"""Which modules are not recorded for a while, as their records did not pay.

Decided by counts and sizes alone, never by a clock: a step runs on upstream's own gradient, a record on one inside the
window, and the same program has to give the same numbers every time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from ..adapters import record_of, refuse
from ..core.by_identity import ByIdentity
from .context import learns
from .nodes import FunctionNode, InputNode, NeuronNode, Node, StackNode
from .planner import Plan

# What is saved and spent, in steps of a small neuron with its linear layer, forward and backward: about 120
# microseconds on one core of a fast machine.
RUN, CALL, FUNCTION = 6.1, 4.0, 1.0
"""To run a record, and in it each neuron and each function over all steps."""
CALLED, STEPPED = 0.1, 0.2
"""To record a step of a function beyond what it would have taken; and one that upstream's forward runs in the end."""
NO_GRAD = 0.8
"""A step without gradient."""
LARGE = 20_000
"""Values (samples times neurons) on which a neuron's step costs another step more than fused."""

SHORT = 2
"""Records in a row that did not pay, after which a module is stepped for a while."""
FIRST_PAUSE, LONGEST_PAUSE = 256, 4096
"""Calls for which it is not recorded: each time four times as many."""


@dataclass(slots=True)
class Rest:
    """What is known of a module that is not recorded now, or may not be soon."""

    short: int = 0  # records in a row that did not pay
    left: int = 0  # calls that will not be recorded
    pause: int = FIRST_PAUSE  # how many, the next time
    forward: Any = None  # of one that cannot be recorded: the forward that it had then
    way: ShortWay | None = None  # of one that can
    fed: bool = False  # whether the layer that feeds it in plain steps has been looked for


class ShortWay(NamedTuple):
    """How a resting neuron comes to upstream's forward without Module.__call__ and the hook on its forward."""

    hooked: Any  # its class's forward as it was then
    bare: Any  # what upstream's forward does
    unmarked: bool  # whether the active options are its own
    record: Any  # where its steps are counted


backoff: ByIdentity[Rest] = ByIdentity()


def forward_of(module: nn.Module) -> Any:
    """What a call of the module comes to; a patch of the module or its class is another one."""
    return module.__dict__.get("forward") or type(module).forward


def resting(module: nn.Module) -> Rest | None:
    """Why this call of the module is not to be recorded; None if it is."""
    found = backoff.get(module)
    if found is None or not found.left:
        return None
    if found.forward is not None and found.forward is not forward_of(module):
        backoff.pop(module)
        return None
    found.left -= 1
    return found


def will_rest(module: nn.Module | None) -> bool:
    """Whether the next call of the module is not to be recorded."""
    found = backoff.get(module)
    return found is not None and found.left > 0


def judge(plan: Plan, stepped: set[Node]) -> None:
    """Note, after a record has run, of which modules it paid to record the steps. ``stepped``: the nodes whose calls
    ran one by one."""
    paid = sum(_saved(node, node in stepped) for node in plan.sources if node not in plan.inside) > RUN
    # why it did not pay, None where it did; and its short way
    found: dict[nn.Module, tuple[str | None, ShortWay | None]] = {}
    for node in plan.sources:
        if isinstance(node, NeuronNode):
            why = _reason(node, plan, node in stepped) if node in stepped or not paid else None
            if why is not None or node.module not in found:
                found[node.module] = why, _short_way(node)
        elif isinstance(node, InputNode):
            found[node.kwargs["module"]] = None if paid else "", None
    for module, (why, way) in found.items():
        _note(module, why, way)


def _short_way(node: NeuronNode) -> ShortWay | None:
    if node.forward is None:
        return None
    return ShortWay(node.forward, node.adapter.bare(node.upstream), node.unmarked, record_of(node.module))


def _saved(node: Node, stepped: bool) -> float:
    """Against upstream's own steps."""
    n = len(node)
    if isinstance(node, NeuronNode):
        step = (1 if node.neuron.spec.spiking else 0.5) * (1 if learns(node.mode) else NO_GRAD)
        step += node.shape.numel() / LARGE
        return -STEPPED * n if stepped else n * step - CALL
    if isinstance(node, FunctionNode) and not isinstance(node, InputNode | StackNode):
        return -(STEPPED * n if stepped else CALLED * n + FUNCTION)
    return 0.0


def _reason(node: NeuronNode, plan: Plan, stepped: bool) -> str:
    n = len(node)
    if n == 1:
        return ""  # known: called step by step
    if not stepped:
        return f"runs of {n} steps on {node.shape.numel()} values, too few for recording to pay"
    if plan.wants_currents(node):
        return "a state besides the membrane is wanted of every step"
    alone = node in plan.alone and not plan.feeds_itself(node)
    return "" if alone else "layers that feed each other in a circle"


def _note(module: nn.Module, why: str | None, way: ShortWay | None) -> None:
    if why is None:
        backoff.pop(module)
        return
    if module not in backoff:
        backoff[module] = Rest()
    rest = backoff[module]
    rest.way = way
    rest.short += 1
    if rest.short >= SHORT:
        rest.left, rest.pause = rest.pause, min(LONGEST_PAUSE, 4 * rest.pause)
        if why:
            refuse(module, why)
