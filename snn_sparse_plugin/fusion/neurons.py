"""Single steps of neurons, recorded instead of run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import (
    Adapter,
    Neuron,
    cuts_nothing,
    is_unmarked,
    record_of,
    refuse,
    run_whole,
    settled,
)
from ..core import tally
from ..core.config import SparseConfig
from ..core.precision import HALF, any_autocast
from ..ops.spiking_layer.prepared import like as form_of
from .context import here, mode_to_record
from .flush import flush, realize
from .fused import takes_step, template_of
from .governor import Rest, backoff, forward_of, resting
from .known import Known, keep, recall
from .nodes import NeuronNode
from .precision import matters, of_step
from .record import Record, open_record
from .recorded import Recorded, value_of
from .shortcuts import advance, are_numbers, hooked_forward, likes, result
from .sources import note_feeding

ASK_AGAIN = 64
"""Calls after which a neuron that could not be recorded is tried again."""


def step(
    adapter: Adapter,
    module: nn.Module,
    upstream: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    config: SparseConfig,
) -> Any:
    """What the hook on a neuron's forward calls: the step is recorded, or upstream's forward runs on numbers."""
    rest = None
    if not here.paused:
        record = here.record
        if record is not None and not kwargs:
            node = record.neurons.get(id(module))
            if node is not None and node.config is config:
                found = advance(record, node, args)
                if found is not None:
                    return found
        rest = resting(module)
        if rest is None:
            found = _record(adapter, module, upstream, args, kwargs, config)
            if found is not None:
                return found
        elif rest.forward is None and not kwargs and are_numbers(args, module) and cuts_nothing(config):
            if not rest.fed and args:
                rest.fed = True
                note_feeding(args[0], module)
            return run_whole(adapter.bare(upstream), module, args, record_of(module))
    name = type(module).__name__
    realize((args, kwargs), name)
    for buffer in module._buffers.values():
        value = value_of(buffer) if type(buffer) is Recorded else None
        if value is not None:  # a finalizer may find it in the middle of a step; upstream may not ask for it
            flush(value[0].record, name)
    if rest is not None and rest.forward is None:
        with settled():
            return upstream(module, *args, **kwargs)
    return upstream(module, *args, **kwargs)


def settle(module: nn.Module) -> None:
    """Run the record if it holds steps of this module."""
    record = here.record
    if record is not None and id(module) in record.neurons:
        flush(record, f"an attribute of {type(module).__name__}")


def _record(
    adapter: Adapter, module: nn.Module, upstream: Callable[..., Any], args: Any, kwargs: Any, config: Any
) -> Any:
    call = adapter.read_call(module, args, kwargs)
    if call is None:
        return None
    x, leaves, like = call
    state = next(iter(leaves.values()), None)
    value = value_of(x) if isinstance(x, Tensor) else None
    if value is not None:
        shape, dtype, device = value[0].shape, value[0].dtypes[value[2]], value[0].device
    elif type(x) is Tensor and x.layout is torch.strided:
        shape, dtype, device = x.shape, x.dtype, x.device
    else:
        kind = f"layout {x.layout}" if type(x) is Tensor else f"type {type(x).__name__}"
        return refuse(module, f"an input of {kind}: step loops of dense tensors are recorded")
    mode = mode_to_record()
    if dtype not in (torch.float32, *HALF) or not shape:
        what = f"{dtype}" if shape else "no dimensions"
        return refuse(module, f"an input of {what}: step loops of float32 and half precision are recorded")
    if mode is None:
        return refuse(module, "a mode, transform or hook of torch under which nothing is recorded")
    if adapter.zeros_for_other_shapes:
        leaves = {n: leaf if leaf is not None and leaf.shape == shape else None for n, leaf in leaves.items()}
    values = [value_of(leaf) for leaf in leaves.values() if leaf is not None]
    before = next((value[0] for value in values if value is not None), None)
    record = open_record()
    if config.max_steps is not None and before is not None and len(before) >= config.max_steps:
        flush(record, "max_steps")
        return _record(adapter, module, upstream, args, kwargs, config)
    if before is None and type(x) is Tensor:
        record = _without_leftovers(record)
    if (value is not None and not (value[0].record is record and value[0].readable)) or not record.enter():
        return None
    try:
        node: Any = before
        if not (
            type(node) is NeuronNode
            and node.record is record
            and node.module is module
            and node.config is config
            and node.mode == mode
            and likes(node, shape, dtype, device)
            and node.left(list(leaves.values()))
            and node.description.holds(node.module)
        ):
            if type(x) is Tensor:
                note_feeding(x, module)
            template = template_of(shape, dtype, device)
            node = _open(record, adapter, module, upstream, config, leaves, like, template)
            if node is None:
                return None
            if len(args) == 2 and node.order_of_state == (1,) and state is args[1]:
                node.given_at = 2
        node.arguments[0].append(record.entry(x))
        node.record.count(node)
        return result(node)
    finally:
        record.leave()


def _without_leftovers(record: Record) -> Record:
    """A loop begins: the record for it, a new one where nobody can reach a result of what came before."""
    if not record.nodes or tally.watchers.get() is not None or not record.enter():
        return record
    try:
        if record.awaited():
            return record
        record.close()
    finally:
        record.leave()
    return open_record()


def _open(
    record: Record,
    adapter: Adapter,
    module: nn.Module,
    upstream: Callable[..., Any],
    config: SparseConfig,
    leaves: dict[str, Any],
    like: Any,
    x: Tensor,
) -> NeuronNode | None:
    """A new node for steps on inputs like ``x``."""
    known = None
    try:
        known = recall(module)
        neuron = adapter.neuron(module) if known is None else known.neuron
    except Exception:  # upstream's own forward does not ask for a description
        neuron = "its adapter failed"
    present = [leaf for leaf in leaves.values() if leaf is not None]
    out_shape: torch.Size | str = "a state that is no dense tensor, or of another loop"
    if isinstance(neuron, Neuron) and all(_fits(leaf, record) for leaf in present):
        out_shape = _shape_of_step(known, neuron, x, [_plain(leaf) for leaf in present])
    if isinstance(neuron, str) or isinstance(out_shape, str):
        backoff[module] = Rest(left=ASK_AGAIN, forward=forward_of(module))
        if isinstance(neuron, Neuron):
            refuse(module, str(out_shape))
        return None
    dtypes = None
    if matters(x.dtype, neuron.multiplies):
        plain = {name: None if leaf is None else _plain(leaf) for name, leaf in leaves.items()}
        dtypes = of_step(adapter, upstream, module, x, plain, like, neuron.values)
    adapter.begin(module)
    description = None if known is None else known.description
    node = NeuronNode(record, adapter, module, neuron, upstream, config, leaves, like, dtypes, description)
    if known is None:
        keep(adapter, module, neuron, node.description)
    node.shape, node.device, node.input_shape, node.input_dtype = out_shape, x.device, x.shape, x.dtype
    node.forward, node.unmarked = hooked_forward(module), is_unmarked(module)
    record.neurons[id(module)] = node
    return node


def _shape_of_step(known: Known | None, neuron: Neuron, x: Tensor, state: list[Tensor]) -> torch.Size | str:
    """What :func:`takes_step` says, which of a neuron that is known is asked once."""
    if known is None:
        return takes_step(neuron, x, state)
    form = (any_autocast(), form_of(x), *map(form_of, state))
    return known.shape_of_step(form, lambda: takes_step(neuron, x, state))


def _fits(leaf: Any, record: Record) -> bool:
    value = value_of(leaf)
    if value is not None:
        return value[0].record is record and value[0].readable
    return isinstance(leaf, Tensor) and type(leaf) in (Tensor, nn.Parameter) and leaf.layout is torch.strided


def _plain(leaf: Any) -> Tensor:
    """A tensor of the same shape and dtype."""
    if type(leaf) is not Recorded:
        return leaf  # type: ignore[no-any-return]
    return torch.empty((), dtype=leaf.dtype, device=leaf.device).expand(leaf.shape)
