"""Where a step loop's plain inputs enter the record, and the places where recorded steps may wait no longer."""

from __future__ import annotations

import atexit
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from ..adapters import config_of, has_hooks
from ..core.by_identity import ByIdentity
from ..core.config import SparseConfig, active_config
from ..core.precision import HALF
from .ahead import ENOUGH, begin
from .calls import next_linear, record_linear
from .context import here, mode_to_record
from .governor import backoff, resting, will_rest
from .nodes import InputNode
from .record import open_record
from .recorded import Recorded

MODULE_CALL, CALL_IMPL = nn.Module.__call__, nn.Module._call_impl
_Module, _Linear = nn.Module, nn.Linear
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_feeding: ByIdentity[ref[nn.Module]] = ByIdentity()  # layers, and the neuron that each feeds
_looked_at: ByIdentity[int] = ByIdentity()  # others, and how many of their calls within blocks were looked at
_lock = threading.RLock()
_inside = 0
_for_good: Any = None  # the block that never ends

SEARCH = 256
"""Calls of layers, outside a block, among which the one is looked for that feeds a neuron."""
ENOUGH_OF_ONE = 64
"""Calls of a layer, within blocks, that no neuron has read, after which it is not looked at: it is the last, or stands
in a neuron."""


class _Recent(threading.local):
    def __init__(self) -> None:
        self.calls: deque[tuple[nn.Module, ref[Tensor], Any]] = deque(maxlen=32)
        self.left = 0  # calls to look at


_recent = _Recent()


class watched:
    """Inside the block, layers with weights that feed neurons take part in the record although their input is plain.

    Which ones feed neurons is seen the first time that a neuron gets their output. A class keeps the hook until one of
    its layers is called outside: to change a class costs its next call more than most steps.
    """

    __slots__ = ()

    def __enter__(self) -> None:
        global _inside
        with _lock:
            _inside += 1
            for cls in _LAYERS:
                if "__call__" not in cls.__dict__:  # else ours, or somebody's who has to be asked
                    cls.__call__ = _CALLS[cls]  # type: ignore[method-assign]

    def __exit__(self, *_: object) -> None:
        global _inside
        with _lock:
            _inside -= 1


@atexit.register  # before the interpreter clears what the hooks use
def _unhook(*classes: type[nn.Module]) -> None:
    with _lock:
        for cls in () if _inside else classes or _LAYERS:
            if cls.__dict__.get("__call__") is _CALLS[cls]:
                with suppress(AttributeError):  # a finalizer that comes in between has done it
                    del cls.__call__  # type: ignore[attr-defined]


def watch() -> None:
    """The same from now on, for neurons that are sparse without a block: a model's, or those of a face."""
    global _for_good
    _recent.left = SEARCH
    if _for_good is None:
        _for_good = watched()
        _for_good.__enter__()
        atexit.register(_for_good.__exit__, None, None, None)  # before _unhook, which was registered earlier


def _call_of(cls: type[nn.Module]) -> Callable[..., Any]:
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not _inside:
            if not torch.compiler.is_compiling():
                _unhook(cls)
        elif len(args) == 1 and not kwargs:
            x = args[0]
            if type(x) is Recorded:
                found = _linear(self, x) if type(self) is _Linear else None
            else:
                found = _next_of_plain(cls, self, x)
                if found is None and not _stays_plain(self):
                    found = _of_plain(cls, self, x)
            if found is not None:
                return found
        return super(cls, self).__call__(*args, **kwargs)

    return __call__


_CALLS: dict[type[nn.Module], Any] = {cls: _call_of(cls) for cls in _LAYERS}


def _next_of_plain(cls: Any, self: Any, x: Any) -> Any:
    """What :func:`_of_plain` comes to at most steps: the next slice of a tensor, for a Linear that is recorded."""
    if torch.compiler.is_dynamo_compiling() or type(x) is not Tensor or type(self) is not _Linear:
        return None
    record, config = here.record, active_config()
    node = None if record is None else record.inputs.get(id(self))
    if node is None or config is None or not config.fuse_time:
        return None
    mode, own = mode_to_record(), _own_parameters(self)
    if mode is None or own is None or node.mode != mode or not node.follow(x):
        return None
    return _entered(cls, self, node, own, mode)


def _stays_plain(self: Any) -> bool:
    """Whether :func:`_of_plain` would find nothing, as the layer feeds no neuron, or one that is not recorded now."""
    if torch.compiler.is_compiling():
        return False
    fed = _feeding.look(id(self))
    if fed is None:
        looked_at = _looked_at.look(id(self))
        return looked_at is not None and looked_at[0] >= ENOUGH_OF_ONE
    rest = backoff.look(id(fed[0]()))  # will_rest, written out
    if rest is None or not rest[0].left:
        return False
    return here.record is None or id(self) not in here.record.inputs


def _of_plain(cls: Any, self: Any, x: Any) -> Any:
    """The result of a layer on a plain tensor, as far as it is recorded; None for the ``__call__`` above ``cls``."""
    if type(x) is not Tensor or torch.compiler.is_compiling():
        return None
    config = active_config()
    fed = _feeding.get(self)
    neuron = None if fed is None else fed()
    if config is None:
        config = None if neuron is None else config_of(neuron)
        if config is None and not _recent.left:
            return None
    if config is not None and not config.fuse_time:
        return None
    record = here.record
    node = None if record is None else record.inputs.get(id(self))
    if config is None or (node is None and fed is None):
        if config is None:
            _recent.left -= 1
        elif not _looks_at(self):
            return None
        out = super(cls, self).__call__(x)
        if type(out) is Tensor:
            _recent.calls.append((self, ref(out), out.grad_fn))
        return out
    if node is None and (will_rest(neuron) or resting(self)):
        return None
    mode = mode_to_record()
    if mode is None:
        return None
    if node is None or node.mode != mode or not node.follow(x):
        if x.layout is not torch.strided or x.dtype not in (torch.float32, *HALF):
            return None
        node = _entering(node, self, x, mode, config)
        if node is None:
            return None
    return _entered(cls, self, node, _own_parameters(self) if type(self) is _Linear else None, mode)


def _entered(cls: Any, self: Any, node: InputNode, own: tuple[Any, Any] | None, mode: int) -> Any:
    """The layer's result on the newest input of its node."""
    found = None if own is None else next_linear((node, len(node.order) - 1, 0), *own, mode)
    if found is None:
        if not node.record.enter():
            return None
        try:
            entered = node.make(0)
        finally:
            node.record.leave()
        found = super(cls, self).__call__(entered) if own is None else record_linear(entered, *own)
    return found


def _looks_at(module: nn.Module) -> bool:
    """Whether another call of a layer is looked at that feeds no neuron up to now. What was found is let go of with the
    last: it holds graphs."""
    looked_at = (_looked_at.get(module) or 0) + 1
    _looked_at[module] = looked_at
    if looked_at >= ENOUGH_OF_ONE:
        _recent.calls.clear()
    return looked_at < ENOUGH_OF_ONE


def _linear(self: nn.Linear, x: Recorded) -> Any:
    """What the layer's own ``__call__`` comes to, without its detours; None where it is more than its forward."""
    own = _own_parameters(self)
    if own is None:
        return None
    found = next_linear(x._value, *own, mode_to_record())
    return record_linear(x, *own) if found is None else found


def _own_parameters(self: nn.Linear) -> tuple[Any, Any] | None:
    """Weight and bias, where a call multiplies with them and does nothing else."""
    held = self.__dict__
    own = held["_parameters"]
    if (
        "weight" in own
        and "bias" in own
        and "forward" not in held
        and _Module.__call__ is MODULE_CALL  # is_listened_to, written out
        and _Module._call_impl is CALL_IMPL
        and not has_hooks(self)
    ):
        return own["weight"], own["bias"]
    return None


def is_listened_to(module: nn.Module) -> bool:
    """Whether a call of the module does more than its forward: hooks, or a tracer of graphs in Module.__call__."""
    return _Module.__call__ is not MODULE_CALL or _Module._call_impl is not CALL_IMPL or has_hooks(module)


def _entering(
    node: InputNode | None, module: nn.Module, x: Tensor, mode: int, config: SparseConfig
) -> InputNode | None:
    """Put a plain input of a layer into its node, which is returned; None where there is none now."""
    record = open_record()
    if not record.enter():
        return None
    try:
        if (
            node is None
            or node.record is not record
            or node.mode != mode
            or node.shape != x.shape
            or node.dtypes[0] != x.dtype
            or node.device != x.device
        ):
            node = record.inputs[id(module)] = InputNode(record, module)
            node.shape, node.dtypes, node.device = x.shape, (x.dtype,), x.device
        node.take(x)
        if len(node.order) == ENOUGH:
            begin(node, config)
        return node
    finally:
        record.leave()


def note_feeding(x: Tensor, neuron: nn.Module) -> None:
    """A neuron got this plain tensor: remember the layer that made it, if one did."""
    if active_config() is None:
        watch()
    if not (_recent.calls or _looked_at):
        return
    grad_fns: list[Any] = [x.grad_fn]
    seen: list[Any] = []
    while grad_fns and len(seen) < 16:
        grad_fn = grad_fns.pop(0)
        if grad_fn is not None and not any(grad_fn is other for other in seen):
            seen.append(grad_fn)
            grad_fns += [n for n, _ in grad_fn.next_functions]
    made = [
        module
        for module, out, grad_fn in _recent.calls
        if out() is x or (grad_fn is not None and any(grad_fn is other for other in seen))
    ]
    for module in made:
        _feeding[module] = ref(neuron)
        _looked_at.pop(module)
    if seen and not made:
        _looked_at.clear()  # one of the layers that fed none
    _recent.calls.clear()
