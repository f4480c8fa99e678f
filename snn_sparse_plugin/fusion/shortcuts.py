"""The short ways of a neuron's step: those that most steps take.

One to the next entry of a node that is there, one past Module.__call__ and the hook on forward, which take as long as
recording, and one of a resting neuron to upstream's forward.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import active, config_of, has_hooks, is_hook
from ..adapters.active import here as firing
from ..core import tally
from ..core.config import active_blocks, active_config
from .context import here, mode_to_record
from .flush import flush
from .governor import ShortWay, backoff
from .nodes import NeuronNode, Node
from .record import Record
from .recorded import Recorded
from .sources import CALL_IMPL, MODULE_CALL, is_listened_to

_lock = threading.RLock()


def advance(record: Record, node: NeuronNode, args: tuple[Any, ...]) -> Any:
    """The next step of a node, where the state is the one that its last step left; else None."""
    calls = record.calls
    if calls > record.look and record.is_full():
        flush(record, "a large record")
        return None
    state: Any = args[-1]
    # the one state that the first step was given, too, is seen at once
    if node.given_at != len(args) or type(state) is not Recorded or state._value is not node.newest[1]:
        leaves = node.adapter.next_state(node.module, args)
        if leaves is None or not node.left(leaves):
            return None
    x, argument = args[0], node.arguments[0]
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
    elif type(x) is Tensor and likes(node, x.shape, x.dtype, x.device):
        entry = record.plain.entry(x)
    else:
        return None
    if node.mode != mode_to_record() or not node.description.holds(node.module):
        return None
    order, steps = node.order, node.config.max_steps
    if steps is not None and len(order) >= steps:
        return None
    if record.entered():
        return None
    record.enter_lock()  # record.enter(), written out
    try:
        if record.closed:
            return None
        if follows:
            argument.stop += 1
        else:
            argument.append(entry)
        order.append(record.calls)
        record.calls += 1
        return result(node)
    finally:
        record.leave()


def _takes(node: NeuronNode, source: Node, slot: int) -> bool:
    """Whether a result of another node is what this one may read."""
    here = source.record is node.record and source.readable
    return here and likes(node, source.shape, source.dtypes[slot], source.device)


def likes(node: NeuronNode, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether these are those of the node's inputs."""
    return shape == node.input_shape and dtype is node.input_dtype and device == node.device


def result(node: NeuronNode) -> Any:
    """What upstream's forward returns for the newest step."""
    out = node.make(0)
    new = {}
    for name, slot in node.named_slots:
        new[name] = node.make(slot) if slot else out
    return node.adapter.write_call(node.module, out, new, node.like)


def are_numbers(args: tuple[Any, ...], module: nn.Module | None = None) -> bool:
    """Whether the arguments of a step, and the states inside the module, are plain tensors: written out, as it is
    asked at every step."""
    for x in args:
        if type(x) is not Tensor and x is not None:
            if not isinstance(x, tuple):
                return False
            for part in x:
                if type(part) is not Tensor and not are_numbers((part,)):
                    return False
    if module is not None:
        for x in module._buffers.values():
            if type(x) is Recorded:
                return False
    return True


def hooked_forward(module: nn.Module) -> Any:
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
        if args and not (kwargs or active.idle):
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
                    found = advance(record, node, args)
                    if found is not None:
                        return found
            elif not torch.compiler.is_dynamo_compiling():
                known = backoff.look(id(self))
                rest = None if known is None else known[0]
                way = rest.way if rest is not None and rest.left and rest.fed else None
                if rest is not None and way is not None and _goes_short(self, way, args):
                    rest.left -= 1
                    before, firing.whole = firing.whole, (self, way.record)  # run_whole, written out
                    try:
                        return way.bare(self, *args)
                    finally:
                        firing.whole = before
        return super(cls, self).__call__(*args, **kwargs)

    return __call__


def _goes_short(module: nn.Module, way: ShortWay, args: tuple[Any, ...]) -> bool:
    """Whether the runner's ``step`` would run upstream's forward as it is, on these very arguments."""
    blocks = active_blocks.get()  # active_config, written out, as are is_listened_to and cuts_nothing below
    config = (blocks[-1][0] if blocks else None) if way.unmarked else config_of(module)
    record = here.record
    return (
        config is not None
        and config.steps_whole
        and way.hooked is type(module).forward
        and "forward" not in module.__dict__
        and not here.paused
        and (record is None or id(module) not in record.neurons)
        and are_numbers(args, module)
        and _Module.__call__ is MODULE_CALL
        and _Module._call_impl is CALL_IMPL
        and not has_hooks(module)
        and not tally.watchers.blocks.get()
        and not _transformed()
    )


_Module, _transformed = nn.Module, torch._C._are_functorch_transforms_active
