"""Single steps of neurons, recorded instead of run."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from ..adapters import (
    Adapter,
    Neuron,
    config_of,
    cuts_nothing,
    is_hook,
    is_unmarked,
    record_of,
    refuse,
    run_whole,
    settled,
)
from ..core import tally
from ..core.config import SparseConfig, active_config
from ..core.precision import HALF
from .context import here, mode_to_record
from .flush import flush, realize
from .fused import takes_step
from .governor import Rest, ShortWay, backoff, forward_of, resting
from .nodes import NeuronNode, Node
from .precision import matters, of_step
from .record import Record, open_record
from .recorded import Recorded, value_of
from .sources import MODULE_CALL, is_listened_to, note_feeding

_lock = threading.RLock()

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
                found = _advance(record, node, args)
                if found is not None:
                    return found
        rest = resting(module)
        if rest is None:
            found = _record(adapter, module, upstream, args, kwargs, config)
            if found is not None:
                return found
        elif rest.forward is None and not kwargs and _are_numbers(args, module) and cuts_nothing(config):
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


def _are_numbers(args: tuple[Any, ...], module: nn.Module | None = None) -> bool:
    """Whether the arguments of a step, and the states inside the module, are plain tensors: written out, as it is
    asked at every step."""
    for x in args:
        kind = type(x)
        if kind is not Tensor and x is not None and not (isinstance(x, tuple) and _are_numbers(x)):
            return False
    if module is not None:
        for x in module._buffers.values():
            if type(x) is Recorded:
                return False
    return True


def settle(module: nn.Module) -> None:
    """Run the record if it holds steps of this module."""
    record = here.record
    if record is not None and id(module) in record.neurons:
        flush(record, f"an attribute of {type(module).__name__}")


def _advance(record: Record, node: NeuronNode, args: tuple[Any, ...]) -> Any:
    """The next step of a node, where the state is the one that its last step left; else None."""
    calls = record.calls
    if calls > record.look and record.is_full():
        flush(record, "a large record")
        return None
    leaves, x, argument = node.adapter.next_state(node.module, args), args[0], node.arguments[0]
    if leaves is None or not node.left(leaves):
        return None
    entry: Any
    follows = False  # whether it is the next of successive values, as at most steps
    if type(x) is Recorded:
        entry = x.__dict__.get("_value")  # value_of, written out
        if entry is None:
            return None
        source, call, slot = entry
        if source is argument.source:
            follows = call == argument.stop and slot == argument.slot
        elif not _takes(node, source, slot):
            return None
    elif type(x) is Tensor and _likes(node, x.shape, x.dtype, x.device):
        entry = record.plain.entry(x)
    else:
        return None
    if node.mode != mode_to_record() or not node.description.holds():
        return None
    order, steps = node.order, node.config.max_steps
    if steps is not None and len(order) >= steps:
        return None
    if record.entered():
        return None
    with record.lock:  # record.enter(), written out
        if record.closed:
            return None
        if follows:
            argument.stop += 1
        else:
            argument.append(entry)
        order.append(record.calls)
        record.calls += 1
        return _result(node)


def _takes(node: NeuronNode, source: Node, slot: int) -> bool:
    """Whether a result of another node is what this one may read."""
    here = source.record is node.record and source.readable
    return here and _likes(node, source.shape, source.dtypes[slot], source.device)


def _likes(node: NeuronNode, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether these are those of the node's inputs."""
    return shape == node.input_shape and dtype is node.input_dtype and device == node.device


def _result(node: NeuronNode) -> Any:
    """What upstream's forward returns for the newest step."""
    out = node.make(0)
    new = {}
    for name, slot in node.named_slots:
        new[name] = node.make(slot) if slot else out
    return node.adapter.write_call(node.module, out, new, node.like)


def _record(
    adapter: Adapter, module: nn.Module, upstream: Callable[..., Any], args: Any, kwargs: Any, config: Any
) -> Any:
    call = adapter.read_call(module, args, kwargs)
    if call is None:
        return None
    x, leaves, like = call
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
            and _likes(node, shape, dtype, device)
            and node.left(list(leaves.values()))
            and node.description.holds()
        ):
            if type(x) is Tensor:
                note_feeding(x, module)
            template = torch.empty((), dtype=dtype, device=device).expand(shape)
            node = _open(record, adapter, module, upstream, config, leaves, like, template)
            if node is None:
                return None
        node.arguments[0].append(record.entry(x))
        node.record.count(node)
        return _result(node)
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
    try:
        neuron = adapter.neuron(module)
    except Exception:  # upstream's own forward does not ask for a description
        neuron = "its adapter failed"
    present = [leaf for leaf in leaves.values() if leaf is not None]
    out_shape: torch.Size | str = "a state that is no dense tensor, or of another loop"
    if isinstance(neuron, Neuron) and all(_fits(leaf, record) for leaf in present):
        out_shape = takes_step(neuron, x, [_plain(leaf) for leaf in present])
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
    node = NeuronNode(record, adapter, module, neuron, upstream, config, leaves, like, dtypes)
    node.shape, node.device, node.input_shape, node.input_dtype = out_shape, x.device, x.shape, x.dtype
    node.forward, node.unmarked = _hooked_forward(module), is_unmarked(module)
    record.neurons[id(module)] = node
    return node


# --- the way around Module.__call__ and the hook on forward, which take as long as recording ---


def _hooked_forward(module: nn.Module) -> Any:
    """The hook that stands for the module's forward, once its class has the shorter way to it; else None."""
    cls = next(cls for cls in type(module).__mro__ if "forward" in vars(cls))
    forward = vars(cls)["forward"]
    if "forward" in vars(module) or not is_hook(forward):
        return None
    with _lock:
        if cls.__call__ is MODULE_CALL:
            cls.__call__ = _call_of(cls)  # type: ignore[method-assign]
    return forward


def _call_of(cls: type[nn.Module]) -> Callable[..., Any]:
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        if args and not kwargs:
            # the last argument is the state, or the input where the module keeps its state: never recorded in a graph
            if type(args[-1]) is Recorded:
                record = here.record
                node = None if record is None else record.neurons.get(id(self))
                if (
                    record is not None
                    and node is not None
                    and node.forward is type(self).forward
                    and node.config is (active_config() if node.unmarked else config_of(self))
                    and not is_listened_to(self)
                ):
                    found = _advance(record, node, args)
                    if found is not None:
                        return found
            elif not torch.compiler.is_compiling():
                rest = backoff.data.get(ref(self))  # type: ignore[attr-defined]
                if rest is not None and rest.left and rest.fed and _goes_short(self, rest.way, args):
                    rest.left -= 1
                    return run_whole(rest.way.bare, self, args, rest.way.record)
        return super(cls, self).__call__(*args, **kwargs)

    return __call__


def _goes_short(module: nn.Module, way: ShortWay | None, args: tuple[Any, ...]) -> bool:
    """Whether :func:`step` would run upstream's forward as it is, on these very arguments."""
    if way is None:
        return False
    config = active_config() if way.unmarked else config_of(module)
    record = here.record
    return (
        config is not None
        and config.fuse_time
        and way.hooked is type(module).forward
        and "forward" not in module.__dict__
        and not here.paused
        and (record is None or id(module) not in record.neurons)
        and _are_numbers(args, module)
        and not is_listened_to(module)
        and cuts_nothing(config)
    )


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
