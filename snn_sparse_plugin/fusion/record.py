"""The record of a step loop: calls of one function at successive steps stand together in a lane."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary, getweakrefcount

import torch
from torch import Tensor, nn

from ..adapters import Adapter, Neuron
from ..core.config import SparseConfig
from ..core.errors import FusionError
from .aliases import Plain
from .columns import Column, Entry, Slices
from .context import grad_mode, here
from .description import Description, version
from .recorded import Recorded, Value
from .spare import ALONE, REUSES, held, make, put_by, references, spare_of

LONGEST = 100_000
"""Calls after which a record runs although nobody asked."""

LARGEST, LARGEST_KEPT = 32 << 20, 512 << 20
"""Bytes after which it does: without gradients, where upstream keeps nothing, and with them, where upstream keeps every
step until the backward."""

SHORTEST = 8
"""Steps of a neuron below which it does not, however large they are."""


class Lane:
    """Calls of one function or neuron, in the order of its steps.

    ``columns``: one for each tensor argument, with an entry for each call. ``order``: the number of each call
    in the record. ``given``: for each result, the tensors that stand for it, in the order of their calls.
    """

    __slots__ = (
        *("columns", "device", "dtype", "given", "linears", "mode", "newest", "order", "record", "results"),
        *("shape", "spare", "where"),
    )

    def __init__(self, record: Record, columns: int, slots: int) -> None:
        self.record, self.mode = record, grad_mode()
        self.columns = [Column() for _ in range(columns)]
        self.order: list[int] = []
        self.given: list[list[Recorded]] = [[] for _ in range(slots)]
        self.newest: list[Value | None] = [None] * slots
        self.results: list[Any] = [None] * slots
        # the lanes of linear layers that read this one: by the ids of weight and bias, and the result's slot
        self.linears: dict[tuple[int, int, int], FunctionLane] = {}
        self.shape: torch.Size
        self.dtype: torch.dtype
        self.device: torch.device
        self.spare: list[Recorded] | None = None
        self.where = _users_line()
        record.lanes.append(self)

    def __len__(self) -> int:
        return len(self.order)

    def make(self, slot: int) -> Recorded:
        """What the user gets from the newest call."""
        self.newest[slot] = value = (self, len(self.order) - 1, slot)
        given = self.given[slot]
        # the tensor of the step before the last, if the loop has let go of it: making one takes longer than the rest
        if REUSES and len(given) > 1:
            made = given[-2]
            if references(made) == ALONE and len(made.__dict__) == 1 and not getweakrefcount(made):
                given[-2], given[-1] = given[-1], made
                made._value = value
                return made
        spare = self.spare
        if spare is None:
            spare = self.spare = spare_of(self.shape, self.dtype, self.device, self.mode)
        made = spare.pop() if spare else make(Recorded, self.shape, dtype=self.dtype, device=self.device)
        made._value = value
        given.append(made)
        return made

    def size(self) -> int:
        """Bytes that its calls take, with their results as if each were made; a tensor object is about a kilobyte."""
        each = self.shape.numel() * self.dtype.itemsize
        return len(self.order) * each * len(self.given) + sum(
            [column.size() for column in self.columns] + [1024 * len(given) for given in self.given]
        )

    def waiting(self) -> list[tuple[Lane, int, int, Recorded]]:
        """The tensors in the user's hands that wait for values of this lane: (lane, slot, call, tensor)."""
        return [
            (self, slot, x._value[1], x)
            for slot, given in enumerate(self.given)
            for x in held(given)
            if type(x) is Recorded
        ]

    def complete(self) -> None:
        """Fill the columns of arguments that were noted once for all calls."""
        for column in self.columns:
            column.fill(len(self.order))

    def let_go(self) -> None:
        """Of all tensors and other lanes; shape, dtype, device and place of origin stay known."""
        for column in self.columns:
            column.clear()
        if self.spare is not None and REUSES:
            put_by(self.given, self.spare)
        self.given.clear()
        self.linears.clear()
        self.newest = [None] * len(self.newest)
        self.results = []

    def entries(self) -> list[Entry]:
        """The tensor arguments of all calls, of successive values the first."""
        return [entry for column in self.columns for entry in column.read()]

    def values(self) -> list[Value]:
        """Those that are recorded values."""
        return [entry for entry in self.entries() if len(entry) == 3]  # type: ignore[misc]


class FunctionLane(Lane):
    """Calls of a stateless function, whose arguments but for tensors are the same at each call.

    ``repeats``: how often the newest call was made again since, each time in a lane of its own.
    """

    __slots__ = ("args", "func", "kwargs", "repeats", "view")

    def __init__(
        self, record: Record, func: Callable[..., Any], args: Any, kwargs: Any, columns: int, view: bool
    ) -> None:
        super().__init__(record, columns, 1)
        self.func, self.args, self.kwargs, self.view = func, args, kwargs, view
        self.repeats = 0


class StackLane(FunctionLane):
    """``torch.stack`` of successive values of one result, which are one column: ``steps``."""

    __slots__ = ("steps",)

    def __init__(self, record: Record, steps: Column) -> None:
        super().__init__(record, torch.stack, (), {}, 0, view=False)
        self.steps = steps

    def let_go(self) -> None:
        super().let_go()
        self.steps.clear()

    def entries(self) -> list[Entry]:
        return self.steps.read()


class InputLane(FunctionLane):
    """Plain inputs of a layer. ``begun``: the search for events in them, where one has begun."""

    __slots__ = ("begun",)

    def __init__(self, record: Record, module: nn.Module) -> None:
        super().__init__(record, same, (), {"module": module}, 1, view=True)  # so that its id stays its own
        self.begun: Any = None

    def follow(self, x: Tensor) -> bool:
        """Note an input that is the one before again, or the next slice of the tensor of all: whether it is one."""
        record, column = self.record, self.columns[0]
        if not record.enter():
            return False
        try:
            if type(column) is Slices:
                if not column.take(x):
                    return False
                if self.begun is not None:
                    self.begun.announce(column.n)
            else:
                before, its_version = last = column.entries[-1]
                if before is not x or version(x) != its_version or x.shape != self.shape:
                    return False
                column.entries.append(last)
            self.order.append(record.calls)
            record.calls += 1
            return True
        finally:
            record.leave()

    def take(self, x: Tensor) -> None:
        """Note the next input, whatever it is."""
        column = self.columns[0]
        if type(column) is Slices:
            self.stop()
            self.columns[0] = column = Column(column)
        column.append(self.record.plain.entry(x))
        self.record.count(self)

    def finish(self) -> None:
        """All inputs are there."""
        if self.begun is not None:
            self.begun.finish(len(self.order))

    def stop(self) -> None:
        """Nobody wants the events that are looked for."""
        if self.begun is not None:
            self.begun.drop()
            self.begun = None

    def let_go(self) -> None:
        self.stop()
        super().let_go()


def same(x: Tensor) -> Tensor:
    """The function of a lane of plain inputs."""
    return x


class NeuronLane(Lane):
    """Successive steps of one neuron, each from the state that the one before left."""

    __slots__ = (
        *(
            "adapter",
            "config",
            "description",
            "forward",
            "initial",
            "input_shape",
            "like",
            "module",
            "neuron",
        ),
        *("named_slots", "order_of_state", "slots", "unmarked", "upstream"),
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
        self.named_slots, self.order_of_state = tuple(self.slots.items()), tuple(self.slots.values())
        self.forward: Any = None  # of the class, if a call of the module comes to nothing but it
        self.unmarked = False  # whether the active config is all that holds for the module
        self.initial: dict[str, Entry | None] = {
            name: None if leaf is None else record.entry(leaf) for name, leaf in leaves.items()
        }
        self.description = Description(adapter, module)
        for _, tensor, _ in self.description.tensors:
            record.plain.guard(tensor)

    def left(self, leaves: Any) -> bool:
        """Whether the last call left this state, given in the order of ``slots``."""
        newest, slots = self.newest, self.order_of_state
        if len(leaves) != len(slots):
            return False
        if len(slots) == 1:  # as most, at every step
            return type(leaves[0]) is Recorded and leaves[0]._value is newest[slots[0]]
        for leaf, slot in zip(leaves, slots):  # noqa: B905, whose keyword costs as much as the rest
            if type(leaf) is not Recorded or leaf._value is not newest[slot]:
                return False
        return True

    def let_go(self) -> None:
        super().let_go()
        self.initial = {}

    def entries(self) -> list[Entry]:
        return [*super().entries(), *(entry for entry in self.initial.values() if entry is not None)]


class Record:
    """What one thread has recorded and not run yet.

    It is written to between :meth:`enter` and :meth:`leave`. A finalizer or signal handler that comes in between, on
    the same thread, finds it entered already: what it calls is recorded elsewhere, and it cannot run this record.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.enter_lock, self.leave, self.entered = self.lock.acquire, self.lock.release, self.lock._is_owned  # type: ignore[attr-defined]
        self.lanes: list[Lane] = []
        self.functions: dict[Any, FunctionLane] = {}
        self.inputs: dict[int, InputLane] = {}  # the lane of a layer's plain inputs, by the layer's id
        self.neurons: dict[int, NeuronLane] = {}  # the newest lane of a module, by the module's id
        self.calls = 0
        self.look = 64  # the number of calls from which on to ask whether it is full
        self.viewed: set[Value] = set()
        self.plain = Plain()
        self.closed = False
        self.error: BaseException | None = None

    def enter(self) -> bool:
        """Begin to write to it: whether that is possible."""
        if self.entered():
            return False
        self.enter_lock()
        if self.closed:
            self.leave()
            return False
        return True

    def count(self, lane: Lane) -> None:
        lane.order.append(self.calls)
        self.calls += 1

    def entry(self, x: Any) -> Entry:
        """What is noted for a tensor argument of a call."""
        return x._value if type(x) is Recorded else self.plain.entry(x)

    def waiting(self) -> list[tuple[Lane, int, int, Recorded]]:
        """Everything in the user's hands that waits for this record: lane, slot, call and tensor."""
        return [found for lane in self.lanes for found in lane.waiting()]

    def is_full(self) -> bool:
        """Whether it has to run before it grows; asked from ``look`` calls on."""
        if self.calls > LONGEST:
            return True
        size = sum(lane.size() for lane in self.lanes)
        room = (LARGEST_KEPT if any(lane.mode == 1 for lane in self.lanes) else LARGEST) - size
        if room <= 0 and any(len(lane) >= SHORTEST for lane in self.neurons.values()):
            return True
        # half as many more as there seems to be room for
        self.look = self.calls + max(32, min(LONGEST, self.calls * room // (2 * max(1, size))))
        return False

    def awaited(self) -> bool:
        """Whether anything waits for this record."""
        return any(lane.waiting() for lane in reversed(self.lanes))

    def close(self) -> None:
        """Let go of everything: lanes refer to each other in circles, and would keep what they made until a search
        for garbage.
        """
        self.closed = True
        for lane in self.lanes:
            lane.let_go()
        self.lanes.clear()
        self.functions.clear()
        self.inputs.clear()
        self.neurons.clear()
        self.plain.clear()


def check_versions(lanes: Any) -> None:
    """Raise :class:`FusionError` if a tensor was changed in place after a step that reads it was recorded."""
    for lane in lanes:
        for entry in lane.entries():
            if len(entry) == 2 and version(entry[0]) != entry[1]:
                raise _changed(lane, "an input of the step")
        if isinstance(lane, NeuronLane):
            name = lane.description.changed_in_place()
            if name is not None:
                raise _changed(lane, f"{name!r} of {type(lane.module).__name__}")


def _changed(lane: Lane, what: str) -> FusionError:
    return FusionError(
        f"{what} was changed in place after the step was recorded at {lane.where}, before its result was used. "
        f"Use the result first (snn_sparse_plugin.fusion.flush.flush() runs what is recorded), or switch time "
        f"fusion off (fuse_time=False, or SNN_SPARSE_FUSE=0)."
    )


backoff: WeakKeyDictionary[nn.Module, list[Any]] = WeakKeyDictionary()
"""Modules whose steps are asked for one by one: single steps so far, calls that will not be recorded, and how many
will not be the next time; of those that cannot be recorded also the forward that they had then."""


def forward_of(module: nn.Module) -> Any:
    """What a call of the module comes to; a patch of the module or its class is another one."""
    return module.__dict__.get("forward") or type(module).forward


def resting(module: nn.Module) -> bool:
    """Whether this call of the module is not to be recorded."""
    found = backoff.get(module) if backoff.data else None  # type: ignore[attr-defined]
    if found is None or not found[1]:
        return False
    if len(found) > 3 and found[3] is not forward_of(module):
        del backoff[module]
        return False
    found[1] -= 1
    return True


reasons: Counter[str] = Counter()
"""Why records ran: the function that wanted numbers, and from where."""


def open_record() -> Record:
    """The record of this thread that takes new calls."""
    record = here.record
    if record is None or record.closed or record.entered():
        record = here.record = Record()
    return record


def _users_line() -> str:
    """``file:line`` of the innermost frame that belongs to neither torch nor this package nor a neuron library."""
    frame = sys._getframe(1)
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        if name.partition(".")[0] not in ("torch", "snn_sparse_plugin", "snntorch", "norse"):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}, in {frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return "an unknown line"
