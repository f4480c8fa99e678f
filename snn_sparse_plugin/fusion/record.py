"""The record of a step loop: calls of one function at successive steps stand together in a lane."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from operator import is_
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from .. import tally
from ..adapters import Adapter, Neuron
from ..config import SparseConfig
from ..errors import FusionError
from .recorded import Recorded, Value

Entry = tuple[Any, ...]
"""One tensor argument of one call: a recorded value (lane, call, slot), or a tensor and its version at that time."""

LONGEST = 100_000
"""Calls after which a record runs although nobody asked, so that its memory is bounded."""


_make = Tensor._make_wrapper_subclass


class Lane:
    """Calls of one function or neuron, in the order of its steps.

    ``columns``: a list for each tensor argument, with an entry for each call. ``order``: the number of each call
    in the record. ``live``: for each result, a weak reference to the tensor that the user got from each call.
    """

    __slots__ = ("columns", "device", "dtype", "live", "mode", "order", "record", "results", "shape", "where")

    def __init__(self, record: Record, columns: int, slots: int) -> None:
        self.record, self.mode = record, grad_mode()
        self.columns: list[list[Entry]] = [[] for _ in range(columns)]
        self.order: list[int] = []
        self.live: list[list[ref[Tensor]]] = [[] for _ in range(slots)]
        self.results: list[Any] = [None] * slots
        self.shape: torch.Size
        self.dtype: torch.dtype
        self.device: torch.device
        self.where = _users_line()
        record.lanes.append(self)

    def __len__(self) -> int:
        return len(self.order)

    def make(self, slot: int) -> Recorded:
        """What the user gets from the newest call."""
        made: Recorded = _make(Recorded, self.shape, dtype=self.dtype, device=self.device)
        made._value = (self, len(self.order) - 1, slot)
        record = self.record
        record.alive += 1
        self.live[slot].append(ref(made, record.gone))
        return made

    def waiting(self, slot: int, call: int) -> Recorded | None:
        """The tensor in the user's hands that waits for this value, if it is still there."""
        found = self.live[slot][call]()
        return found if type(found) is Recorded and found._value == (self, call, slot) else None

    def complete(self) -> None:
        """Fill the columns of arguments that were noted once for all calls."""
        for column in self.columns:
            if len(column) < len(self.order):
                column += column[-1:] * (len(self.order) - len(column))

    def entries(self) -> list[Entry]:
        """Every tensor argument of every call."""
        return [entry for column in self.columns for entry in column]


class FunctionLane(Lane):
    """Calls of a stateless function, whose arguments but for tensors are the same at each call."""

    __slots__ = ("args", "func", "kwargs", "view")

    def __init__(
        self, record: Record, func: Callable[..., Any], args: Any, kwargs: Any, columns: int, view: bool
    ) -> None:
        super().__init__(record, columns, 1)
        self.func, self.args, self.kwargs, self.view = func, args, kwargs, view


class NeuronLane(Lane):
    """Successive steps of one neuron, each from the state that the one before left."""

    __slots__ = (
        *("adapter", "attributes", "config", "initial", "input_shape", "like", "module", "neuron"),
        *("slots", "tensors", "upstream"),
    )

    def __init__(
        self,
        record: Record,
        adapter: Adapter,
        module: nn.Module,
        neuron: Neuron,
        upstream: Callable[..., Any],
        config: SparseConfig,
        leaves: dict[str, Any],
        like: Any,
    ) -> None:
        names = list(leaves)
        same = adapter.output_leaf(module, neuron)
        others = [name for name in names if name != same]
        super().__init__(record, 1, 1 + len(others))
        self.adapter, self.module, self.neuron, self.config = adapter, module, neuron, config
        self.upstream, self.like = upstream, like
        self.input_shape: torch.Size
        self.slots = {name: 0 if name == same else 1 + others.index(name) for name in names}
        self.initial: dict[str, Entry | None] = {
            name: None if leaf is None else entry_of(leaf) for name, leaf in leaves.items()
        }
        self.attributes, self.tensors = _description(adapter, module)

    def continues(self, record: Record, module: nn.Module, leaves: dict[str, Any], config: Any) -> bool:
        """Whether a call from this state is the next step of this lane."""
        last = len(self.order) - 1
        if self.record is not record or self.module is not module or self.config is not config:
            return False
        if self.mode != grad_mode() or len(leaves) != len(self.slots):
            return False
        for name, slot in self.slots.items():
            leaf = leaves[name]
            if type(leaf) is not Recorded:
                return False
            lane, call, place = leaf._value
            if lane is not self or call != last or place != slot:
                return False
        return self.unchanged()

    def unchanged(self) -> bool:
        """Whether the module has the attributes and tensors that it was described with."""
        for owner, kept in self.attributes:
            if len(owner) != len(kept) or not all(map(is_, owner.values(), kept)):
                return False
        for owner, name, tensor, _ in self.tensors:  # noqa: SIM110, at every step
            if owner.get(name) is not tensor:
                return False
        return True

    def entries(self) -> list[Entry]:
        return [*super().entries(), *(entry for entry in self.initial.values() if entry is not None)]


class Record:
    """What one thread has recorded and not run yet."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.lanes: list[Lane] = []
        self.functions: dict[Any, FunctionLane] = {}
        self.neurons: dict[int, NeuronLane] = {}  # the newest lane of a module, by the module's id
        # the lane that a linear layer's next call goes into: by input lane, slot, weight, bias and mode
        self.linears: dict[Any, FunctionLane] = {}
        self.calls = 0
        self.alive = self.busy = 0
        this = ref(self)

        def gone(_: Any) -> None:
            record = this()
            if record is not None:
                record.alive -= 1
                if not record.alive and not record.busy and tally.watchers.get() is None:
                    record.close()  # nobody waits for anything

        self.gone = gone
        self.viewed: set[Value] = set()
        self.closed = False
        self.error: BaseException | None = None

    def count(self, lane: Lane) -> None:
        lane.order.append(self.calls)
        self.calls += 1

    def awaited(self, x: Recorded) -> ref[Tensor]:
        """A weak reference to a tensor that waits for this record."""
        self.alive += 1
        return ref(x, self.gone)

    def __enter__(self) -> None:
        self.lock.acquire()
        self.busy += 1

    def __exit__(self, *_: object) -> None:
        self.busy -= 1
        self.lock.release()

    def close(self) -> None:
        self.closed = True
        self.lanes.clear()
        self.functions.clear()
        self.neurons.clear()
        self.linears.clear()

    def check_versions(self) -> None:
        """Raise :class:`FusionError` if a tensor was changed in place after a step that reads it was recorded."""
        for lane in self.lanes:
            for entry in lane.entries():
                if len(entry) == 2 and version(entry[0]) != entry[1]:
                    raise _changed(lane, "an input of the step")
            if isinstance(lane, NeuronLane):
                for _, name, tensor, before in lane.tensors:
                    if version(tensor) != before:
                        raise _changed(lane, f"{name!r} of {type(lane.module).__name__}")


def _changed(lane: Lane, what: str) -> FusionError:
    return FusionError(
        f"{what} was changed in place after the step was recorded at {lane.where}, before its result was used. "
        f"Use the result first (snn_sparse_plugin.fusion.flush.flush() runs what is recorded), or switch time "
        f"fusion off (fuse_time=False, or SNN_SPARSE_FUSE=0)."
    )


class _Here(threading.local):
    record: Record | None = None
    paused: int = 0


here = _Here()
backoff: WeakKeyDictionary[nn.Module, list[int]] = WeakKeyDictionary()
"""Modules whose steps are asked for one by one: single steps so far, calls that will not be recorded, and how many
will not be the next time."""


def resting(module: nn.Module) -> bool:
    """Whether this call of the module is not to be recorded."""
    found = backoff.get(module) if backoff.data else None  # type: ignore[attr-defined]
    if found is None or not found[1]:
        return False
    found[1] -= 1
    return True


reasons: Counter[str] = Counter()
"""Why records ran: the function that wanted numbers, and from where."""


def open_record() -> Record:
    """The record of this thread that takes new calls."""
    record = here.record
    if record is None or record.closed:
        record = here.record = Record()
    return record


# looked up once: these are asked at every call
_transformed = torch._C._are_functorch_transforms_active
_function_modes = torch._C._len_torch_function_stack
_dispatch_modes = torch._C._len_torch_dispatch_stack
_autocast = torch.is_autocast_enabled
_tracing = torch._C._is_tracing
_saving_hooks = torch._C._autograd._top_saved_tensors_default_hooks


def can_record(device: torch.device) -> bool:
    """Whether a call here and now may run later instead."""
    return not (
        here.paused
        or _transformed()
        or _function_modes()
        or _dispatch_modes()
        or _autocast(device.type)
        or _tracing()
        or _saving_hooks(True) is not None
    )


class paused:
    """Inside the block, this thread records nothing."""

    def __enter__(self) -> None:
        here.paused += 1

    def __exit__(self, *_: object) -> None:
        here.paused -= 1


def grad_mode() -> int:
    """0 without gradients, 1 with, 2 in inference mode."""
    return 2 if torch.is_inference_mode_enabled() else int(torch.is_grad_enabled())


def in_mode(mode: int) -> AbstractContextManager[Any]:
    """What :func:`grad_mode` said, again in force."""
    return torch.inference_mode() if mode == 2 else _without_inference_mode(bool(mode))


@contextmanager
def _without_inference_mode(grad: bool) -> Iterator[None]:
    with torch.inference_mode(False), torch.set_grad_enabled(grad):
        yield


def version(x: Tensor) -> int:
    return -1 if x.is_inference() else x._version


def entry_of(x: Any) -> Entry:
    return x._value if type(x) is Recorded else (x, version(x))


_Description = tuple[
    list[tuple[dict[str, Any], tuple[Any, ...]]], list[tuple[dict[str, Any], str, Tensor, int]]
]


def _description(adapter: Adapter, module: nn.Module) -> _Description:
    """All that a neuron's equations may depend on: attributes by identity, tensors by identity and version."""
    hidden = adapter.hidden_names(module)
    attributes, tensors = [], []
    for owner in module.modules():
        attributes.append((vars(owner), tuple(vars(owner).values())))
        for held in (owner._parameters, owner._buffers):
            tensors += [
                (held, name, value, version(value))
                for name, value in held.items()
                if value is not None and not (owner is module and name in hidden)
            ]
        for value in vars(owner).values():
            tensors += _of_tuple(value)
    return attributes, tensors


def _of_tuple(value: Any) -> list[tuple[dict[str, Any], str, Tensor, int]]:
    """The tensors of Norse's parameters, which are nested named tuples."""
    if not isinstance(value, tuple) or not hasattr(value, "_asdict"):
        return []
    fields = value._asdict()
    found = [(fields, n, v, version(v)) for n, v in fields.items() if isinstance(v, Tensor)]
    return [*found, *(item for v in fields.values() for item in _of_tuple(v))]


def _users_line() -> str:
    """``file:line`` of the innermost frame that belongs to neither torch nor this package nor a neuron library."""
    frame = sys._getframe(1)
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        if name.partition(".")[0] not in ("torch", "snn_sparse_plugin", "snntorch", "norse"):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}, in {frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return "an unknown line"
