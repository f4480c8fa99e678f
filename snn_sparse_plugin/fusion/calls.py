"""Calls of torch functions as entries of nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from .arguments import ArgumentSeries, Entry
from .context import casts, here, mode_to_record
from .flush import flush
from .nodes import FunctionNode, StackNode
from .record import Record
from .recordable import BATCHED, CONSTANTS, LINEAR, VIEWS, Placeholder, batched_dims, filled
from .recorded import Recorded, Value, value_of


class Call:
    """The arguments of a call: ``entries`` of the tensors, ``key``, what tells nodes apart, and their ``shapes``."""

    __slots__ = ("entries", "key", "record", "shapes")

    def __init__(self, func: Any, record: Record) -> None:
        self.record = record
        self.entries: list[Entry] = []
        self.key: list[Any] = [func]
        self.shapes: list[Any] = [func]

    def scan(self, item: Any) -> Any:
        """The form of one argument; raises ``TypeError`` where it cannot be recorded."""
        kind = type(item)
        if kind is Recorded:
            value = value_of(item)
            if value is None or not value[0].readable:
                raise TypeError
            return self._tensor(value, (value[0], value[2]), value[0].shape, value[0].dtypes[value[2]])
        if kind is Tensor or kind is nn.Parameter:
            if item.layout is not torch.strided:
                raise TypeError
            leaf = item.requires_grad and item.is_leaf
            name = id(item) if leaf else (item.shape, item.dtype, item.requires_grad)
            return self._tensor(self.record.entry(item), name, item.shape, item.dtype)
        if kind is tuple or kind is list or kind is torch.Size:
            self._constant(kind, len(item))
            form = [self.scan(part) for part in item]
            return tuple(form) if kind is not list else form
        if kind is slice:
            self._constant(slice, item.start.__class__, item.start, item.stop, item.step)
            if not all(part is None or type(part) is int for part in (item.start, item.stop, item.step)):
                raise TypeError
            return item
        if kind not in CONSTANTS:
            raise TypeError
        self._constant(kind, item)
        return item

    @property
    def tensors(self) -> list[tuple[torch.Size, torch.dtype]]:
        """Shape and dtype of the tensors."""
        return [part for part in self.shapes if _of_tensor(part)]

    def of_one_number(self) -> list[Tensor]:
        """Tensors of these forms that take no memory, with a number to read."""
        return [torch.zeros((), dtype=dtype, device="cpu").expand(shape) for shape, dtype in self.tensors]

    def without_data(self) -> list[Tensor]:
        return [torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in self.tensors]

    def _tensor(self, entry: Entry, name: Any, shape: torch.Size, dtype: torch.dtype) -> Placeholder:
        self.entries.append(entry)
        self.key.append(name)
        self.shapes.append((shape, dtype))
        return Placeholder(len(self.entries) - 1)

    def _constant(self, *parts: Any) -> None:
        self.key.append(parts)
        self.shapes.append(parts)


class Reader(NamedTuple):
    """A node whose next call is told by a look: it has the same constants and parameters, and the next results."""

    node: FunctionNode
    n: int
    same: tuple[tuple[int, Any], ...]  # positions of the arguments that are the same at each call
    named: tuple[tuple[str, Any], ...]
    results: tuple[tuple[int, ArgumentSeries], ...]  # positions of recorded results

    @staticmethod
    def of(node: FunctionNode, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Reader | None:
        """None where an argument may be another although it is the same object, or has parts."""
        same, results, tensors = [], [], 0
        for position, x in enumerate(args):
            if type(x) is Recorded:
                results.append((position, node.arguments[tensors]))
                tensors += 1
            elif isinstance(x, Tensor):
                if not (x.requires_grad and x.is_leaf):
                    return None
                same.append((position, x))
                tensors += 1
            elif _stays(x):
                same.append((position, x))
            else:
                return None
        if not all(map(_stays, kwargs.values())):
            return None
        return Reader(node, len(args), tuple(same), tuple(kwargs.items()), tuple(results))

    def takes(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Value] | None:
        """The results that a call reads, if it is the next one."""
        if len(args) != self.n or len(kwargs) != len(self.named):
            return None
        for position, x in self.same:
            other = args[position]
            if other is not x and not (type(x) is int and type(other) is int and x == other):
                return None
        for name, x in self.named:
            if kwargs.get(name, self) is not x:
                return None
        values = []
        for position, argument in self.results:
            x = args[position]
            value = x.__dict__.get("_value") if type(x) is Recorded else None
            if value is None or not argument.precedes(value):
                return None
            values.append(value)
        return values


def _stays(x: Any) -> bool:
    """Whether an argument is no tensor and cannot be changed."""
    return all(map(_stays, x)) if isinstance(x, tuple) else x is None or type(x) in CONSTANTS


def next_call(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Recorded | None:
    """What :func:`record_call` comes to where the call is the next one of a node that is there; else None."""
    value = args[0].__dict__.get("_value") if args and type(args[0]) is Recorded else None
    reader = None if value is None else value[0].readers.get((func, value[2]))
    if reader is None:
        return None
    node, record = reader.node, here.record
    if node.record is not record or node.mode != mode_to_record() or record.entered():
        return None
    record.enter_lock()  # record.enter(), written out
    try:
        values = None if record.closed else reader.takes(args, kwargs)
        if values is None:
            return None
        for (_, argument), value in zip(reader.results, values, strict=True):
            argument.append(value)
        if node.view:
            record.viewed.update(values)
        node.repeats = 0
        node.order.append(record.calls)
        record.calls += 1
        made = node.make(0)
    finally:
        record.leave()
    if record.calls > record.look and record.is_full():
        flush(record, "a large record")
    return made


def record_call(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Recorded | None:
    """Put a call into its node: -> what stands for the result, or None where the call cannot wait."""
    found = next_call(func, args, kwargs)
    if found is not None:
        return found
    opened = here.record
    if opened is None:
        return None
    call = Call(func, opened)
    try:
        form = call.scan(args)
        named = {}
        for name, item in kwargs.items():
            call._constant(name)
            named[name] = call.scan(item)
    except TypeError:
        return None
    (record, device), mode = place_of(call.entries), mode_to_record()
    if record is None or device is None or mode is None:
        return None
    if not record.enter():
        return None
    try:
        key: Any = (*call.key, mode)
        base = key
        now = [entry for entry in call.entries if len(entry) == 3]
        node = record.functions.get(key)
        # the same function on the same step again stands in a node of its own
        if node is not None and now and now == [c[-1] for c in node.arguments if len(c[-1]) == 3]:
            node.repeats += 1
            key = (key, node.repeats)
            node = record.functions.get(key)
        if node is None:
            whole = bool(now) and all(entry[0].whole for entry in now)
            if whole and record.is_over():
                return None
            made = _result(call, func, form, named, mode, device)
            if made is None:
                return None
            node = FunctionNode(record, func, form, named, len(call.entries), func in VIEWS, whole)
            node.shape, node.dtypes, node.device = made[0], made[1:], device
            record.functions[key] = node
        node.complete()
        node.repeats = 0
        for argument, entry in zip(node.arguments, call.entries, strict=True):
            argument.append(entry)
        if node.view:
            record.viewed.update(now)
        record.count(node)
        made_now = node.make(0)
        # a running sum reads another node at its second call than at its first
        if len(node.order) < 3 and key is base and args and type(args[0]) is Recorded:
            source, _, slot = args[0]._value
            reader = Reader.of(node, args, kwargs)
            if reader is not None:
                source.readers[func, slot] = reader
    finally:
        record.leave()
    if record.calls > record.look and record.is_full():
        flush(record, "a large record")
    return made_now


def record_linear(x: Recorded, weight: Any, bias: Any) -> Recorded | None:
    """:func:`record_call` for the commonest call, whose next ones :func:`next_linear` finds."""
    value = value_of(x)
    made = record_call(LINEAR, (x, weight, bias), {})
    if (
        value is not None
        and made is not None
        and all(t is None or (t.requires_grad and t.is_leaf) for t in (weight, bias))
    ):
        source, _, slot = value
        # the node keeps weight and bias, so that no others take their ids
        node = value_of(made)
        if node is not None:
            source.linears[id(weight), id(bias), slot] = cast(FunctionNode, node[0])
    return made


def next_linear(value: Value, weight: Any, bias: Any, mode: int | None) -> Recorded | None:
    """The next call of a node that is there already, of this value; None if there is none."""
    source, call, slot = value
    node, record = source.linears.get((id(weight), id(bias), slot)), source.record
    if node is None or node.mode != mode or record is not here.record:
        return None
    if record.entered():
        return None
    record.enter_lock()  # record.enter(), written out
    try:
        argument = node.arguments[0]
        # weight and bias are those of the first call, at the version of that time
        if record.closed or source is not argument.source or call != argument.stop or slot != argument.slot:
            return None
        argument.stop = call + 1
        node.repeats = 0
        node.order.append(record.calls)
        record.calls += 1
        return node.make(0)
    finally:
        record.leave()


def record_steps(steps: list[Any] | tuple[Any, ...]) -> Recorded | None:
    """``torch.stack`` of successive values of one result; None if they are something else."""
    if not steps or type(steps[0]) is not Recorded:
        return None
    source, start, slot = steps[0]._value
    if not source.readable:
        return None
    for call, x in enumerate(steps, start):
        if type(x) is not Recorded:
            return None
        node, its_call, its_slot = x._value
        if node is not source or its_call != call or its_slot != slot:
            return None
    if mode_to_record() is None:
        return None
    record, argument = source.record, ArgumentSeries.of_range(source, start, start + len(steps), slot)
    if record is not here.record:
        return None
    if not record.enter():
        return None
    try:
        node = StackNode(record, argument)
        node.shape, node.dtypes, node.device = (
            torch.Size((len(steps), *source.shape)),
            (source.dtypes[slot],),
            source.device,
        )
        record.count(node)
        record.stacked = record.calls
        return node.make(0)
    finally:
        record.leave()


def place_of(entries: list[Entry]) -> tuple[Record | None, torch.device | None]:
    """The one open record of this thread that all recorded arguments belong to, and the device of all arguments."""
    record, device, scalars = here.record, None, True
    for entry in entries:
        if len(entry) == 3:
            node = entry[0]
            if node.record is not record:
                return None, None
            found, scalar = node.device, False
        else:
            found, scalar = entry[0].device, entry[0].dim() == 0
        if device is None or (scalars and not scalar):
            device, scalars = found, scalar
        elif found != device and not scalar:
            return None, None
    return record, device


_shapes: dict[Any, tuple[torch.Size, torch.dtype] | None] = {}


def _result(
    call: Call, func: Any, form: Any, named: Any, mode: int, device: torch.device
) -> tuple[torch.Size, torch.dtype] | None:
    """Shape and dtype of a call's result, seen on tensors without data; None where it is no single tensor."""
    key = (*call.shapes, mode, torch.get_default_dtype())
    if key not in _shapes:
        if len(_shapes) > 4096:
            _shapes.clear()
        if func is LINEAR and not (named or casts(mode)) and (known := _of_linear(call.tensors)):
            _shapes[key] = known
            return known
        if func in BATCHED and not casts(mode) and (known := _of_batched(func, form, named, call.tensors)):
            _shapes[key] = known
            return known
        known = None
        for tensors in _stand_ins(call, func, mode, device):
            try:
                with torch.no_grad():
                    out = func(*filled(form, tensors), **{n: filled(f, tensors) for n, f in named.items()})
                known = (out.shape, out.dtype) if isinstance(out, Tensor) else None
                break
            except Exception:
                continue
        _shapes[key] = known
    return _shapes[key]


def _stand_ins(call: Call, func: Any, mode: int, device: torch.device) -> Iterator[list[Tensor]]:
    """Tensors of the form of the arguments, on which the form of the result is seen; the next where some fail."""
    if casts(mode):  # autocast looks at the device
        yield [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype in call.tensors]
        return
    # of tensors without data torch would ask its compiler, which takes a second or two to import; a view depends on how
    # the numbers lie
    if func not in VIEWS:
        yield call.of_one_number()
    yield call.without_data()


def _of_linear(tensors: list[tuple[torch.Size, torch.dtype]]) -> tuple[torch.Size, torch.dtype] | None:
    """What a linear layer makes of well-formed tensors. To ask torch imports its compiler, for a second or two."""
    if len(tensors) not in (2, 3):
        return None
    (x, dtype), (weight, _), *bias = tensors
    fits = len(x) > 0 and len(weight) == 2 and x[-1] == weight[1] and all(b == weight[:1] for b, _ in bias)
    if not fits or not dtype.is_floating_point or any(other != dtype for _, other in tensors):
        return None
    return torch.Size((*x[:-1], weight[0])), dtype


def _of_batched(
    func: Any, form: Any, named: Any, tensors: list[tuple[torch.Size, torch.dtype]]
) -> tuple[torch.Size, torch.dtype] | None:
    """What a convolution or pool makes of a batch, seen on one of no samples; None where torch has to be asked."""
    (shape, dtype), *others = tensors
    if len(shape) != batched_dims(func) - 1:
        return None
    given = [
        torch.empty(s, dtype=d, device="cpu") for s, d in ((torch.Size((0, *shape[1:])), dtype), *others)
    ]
    try:
        with torch.no_grad():
            out = func(*filled(form, given), **{n: filled(f, given) for n, f in named.items()})
    except RuntimeError:
        return None
    return (torch.Size((shape[0], *out.shape[1:])), out.dtype) if isinstance(out, Tensor) else None


def _of_tensor(part: Any) -> bool:
    """Whether a part of a call's signature is the (shape, dtype) of a tensor."""
    return (
        type(part) is tuple
        and len(part) == 2
        and type(part[0]) is torch.Size
        and type(part[1]) is torch.dtype
    )
