"""Where a step's value stands in the graph: as in the step loop, or beside a layer that ran over all steps at once.

A fused run gives the user values whose numbers are those of the loop, but what the record made of them does not pass
through them. Who asks for a gradient *at* such a value, or listens to one, would get another than upstream's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from ..core.dynamics import NeuronSpec
from ..core.errors import FusionError
from .context import learns
from .nodes import FunctionNode, NeuronNode, Node
from .planner import Plan
from .recorded import Recorded, Value, value_of

BESIDE = "_snn_sparse_beside"
"""Attribute of a tensor that stands beside the graph of later steps: where the loop made it, and its version then."""

_get: Any = Tensor  # its attributes as descriptors
_OF_ITSELF = {
    Tensor.register_hook,
    Tensor.retain_grad,
    Tensor.register_post_accumulate_grad_hook,
    Tensor.requires_grad_,
    *(
        getattr(_get, name).__get__
        for name in ("grad_fn", "requires_grad", "is_leaf", "retains_grad", "output_nr", "_backward_hooks")
    ),
}
_OF_INPUTS = {torch.autograd.backward: 5, Tensor.backward: 4}
"""What looks at the places of some of its arguments, ``inputs``, and where these stand."""


def wants_places(func: Any, items: Any) -> bool:
    """Whether a call of ``func`` looks at a recorded step's place in the graph, which a fused run would not give it."""
    if func is torch.autograd.grad:
        return True
    if func in _OF_ITSELF:
        looked_at = items[0][:1] or items[1].values()
    elif func in _OF_INPUTS:
        args, kwargs = items
        at = _OF_INPUTS[func]
        looked_at = kwargs.get("inputs", args[at] if len(args) > at else None)
    else:
        return False
    values = [value_of(x) for x in _tensors(looked_at)]
    return any(_is_passed(value) for value in values if value is not None)


def _is_passed(value: Value) -> bool:
    """Whether something that is recorded already is made of this value."""
    node, _, slot = value
    if not learns(node.mode):
        return False
    read = (made for other in node.record.nodes if _passes_on(other) for made in other.values())
    return _within_neuron(node, slot) or any(made[0] is node and made[2] == slot for made in read)


def _passes_on(reader: Node) -> bool:
    """Whether gradients pass from a node to what it reads; none do from a comparison or what was detached."""
    detaches = isinstance(reader, FunctionNode) and reader.func is Tensor.detach
    return learns(reader.mode) and reader.dtypes[0].is_floating_point and not detaches


def _within_neuron(node: Node, slot: int) -> bool:
    """Whether a neuron makes its next state, or another result, of this one."""
    if not isinstance(node, NeuronNode):
        return False
    spec = node.neuron.spec
    spikes_alone = isinstance(spec, NeuronSpec) and spec.spiking and not spec.attached
    return slot > 0 or not spikes_alone or node.neuron.recurrent


def note_places(waiting: list[tuple[Node, int, int, Any]], plan: Plan) -> None:
    """After a fused run: remember which of the user's tensors later steps do not pass through."""
    beside: dict[tuple[Node, int], bool] = {}
    for node, slot, _, x in waiting:
        key = node, slot
        if key not in beside:
            beside[key] = _stands_beside(node, slot, plan)
        if beside[key] and x.requires_grad:
            setattr(x, BESIDE, (node.where, x._version))


def _stands_beside(node: Node, slot: int, plan: Plan) -> bool:
    read = any(_passes_on(reader) for reader in plan.readers.get((node, slot), ()))
    if not learns(node.mode) or not (read or _within_neuron(node, slot)):
        return False
    series = node.results[slot]
    return series is None or series.pieces is None  # single pieces are read themselves


def check_place(what: str, *tensors: Any) -> None:
    """Raise :class:`FusionError` for a tensor that stands beside the graph."""
    for x in _tensors(tensors):
        where, version = getattr(x, BESIDE, ("", -1))
        # detached, loaded from a file or changed in place, it is a tensor of its own
        if where and x.grad_fn is not None and x._version == version:
            raise FusionError(
                f"{what} of a step that was recorded at {where} and has run since: the steps of its layer ran all at "
                f"once, so that what was made of this step before does not pass through this tensor, and the gradient "
                f"would not be the loop's. Ask for it before anything reads a number of the loop, or switch time "
                f"fusion off (fuse_time=False, or SNN_SPARSE_FUSE=0)."
            )


def checked(what: str, upstream: Callable[..., Any]) -> Callable[..., Any]:
    """A method of tensors that looks at their place in the graph."""

    @wraps(upstream)
    def method(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling() and type(self) is not Recorded:
            check_place(what, self)
        return upstream(self, *args, **kwargs)

    _OF_ITSELF.add(method)  # by whatever name torch's function protocol finds it
    return method


def _tensors(items: Any) -> Iterator[Tensor]:
    if isinstance(items, Tensor):
        yield items
    elif isinstance(items, Mapping):
        yield from _tensors(items.values())
    elif isinstance(items, Iterable) and not isinstance(items, str | bytes):
        for item in items:
            yield from _tensors(item)
