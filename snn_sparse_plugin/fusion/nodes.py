"""The nodes of a record: each is one function or neuron, with its calls at successive steps."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from weakref import getweakrefcount

import torch
from torch import Tensor, nn

from ..adapters import Adapter, Neuron
from ..core.config import SparseConfig
from .arguments import ArgumentSeries, Entry, Slices
from .context import call_mode
from .description import Description, version
from .precision import Dtypes
from .recorded import Recorded, Value
from .reuse import ALONE, REUSES, held, make, put_by, references, spare_of

if TYPE_CHECKING:
    from .record import Record


class Node:
    """Calls of one function or neuron, in the order of its steps.

    ``arguments``: one for each tensor argument, with an entry for each call. ``order``: the number of each call
    in the record. ``given``: for each result, the tensors that stand for it, in the order of their calls.
    """

    __slots__ = (
        *(
            "arguments",
            "device",
            "dtypes",
            "given",
            "linears",
            "mode",
            "newest",
            "order",
            "readers",
            "record",
            "results",
        ),
        *("shape", "spares", "where"),
    )

    readable = True
    """Whether the value of a call may be an argument of another."""

    whole = False
    """Whether it is made of stacked steps alone, so that it will hardly be called again."""

    def __init__(self, record: Record, arguments: int, slots: int) -> None:
        self.record, self.mode = record, call_mode()
        self.arguments = [ArgumentSeries() for _ in range(arguments)]
        self.order: list[int] = []
        self.given: list[list[Recorded]] = [[] for _ in range(slots)]
        self.newest: list[Value | None] = [None] * slots
        self.results: list[Any] = [None] * slots
        # the nodes of linear layers that read this one: by the ids of weight and bias, and the result's slot
        self.linears: dict[tuple[int, int, int], FunctionNode] = {}
        self.readers: dict[tuple[Any, int], Any] = {}  # of other functions: by function and the result's slot
        self.shape: torch.Size
        self.dtypes: tuple[torch.dtype, ...]  # of each result
        self.device: torch.device
        self.spares: list[list[Recorded] | None] = [None] * slots
        self.where = _users_line()
        record.nodes.append(self)

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
        spare = self.spares[slot]
        if spare is None:
            spare = self.spares[slot] = spare_of(self.shape, self.dtypes[slot], self.device, self.mode)
        made = (
            spare.pop() if spare else make(Recorded, self.shape, dtype=self.dtypes[slot], device=self.device)
        )
        made._value = value
        given.append(made)
        return made

    def size(self) -> int:
        """Bytes that its calls take, with their results as if each were made; a tensor object is about a kilobyte."""
        each = self.shape.numel() * sum(dtype.itemsize for dtype in self.dtypes)
        return len(self.order) * each + sum(
            [argument.size() for argument in self.arguments] + [1024 * len(given) for given in self.given]
        )

    def waiting(self) -> list[tuple[Node, int, int, Recorded]]:
        """The tensors in the user's hands that wait for values of this node: (node, slot, call, tensor)."""
        return [
            (self, slot, x._value[1], x)
            for slot, given in enumerate(self.given)
            for x in held(given)
            if type(x) is Recorded
        ]

    def complete(self) -> None:
        """Fill the series of arguments that were noted once for all calls."""
        for argument in self.arguments:
            argument.fill(len(self.order))

    def let_go(self) -> None:
        """Of all tensors and other nodes; shape, dtype, device and place of origin stay known."""
        for argument in self.arguments:
            argument.clear()
        if REUSES:
            for given, spare in zip(self.given, self.spares, strict=True):
                if spare is not None:
                    put_by(given, spare)
        self.given.clear()
        self.linears.clear()
        self.readers.clear()
        self.newest = [None] * len(self.newest)
        self.results = []

    def replace(self, x: Tensor, other: Tensor) -> None:
        """Read ``other`` wherever ``x`` was to be read."""
        for argument in self.arguments:
            argument.replace(x, other)

    def entries(self) -> list[Entry]:
        """The tensor arguments of all calls, of successive values the first."""
        return [entry for argument in self.arguments for entry in argument.read()]

    def values(self) -> list[Value]:
        """Those that are recorded values."""
        return [entry for entry in self.entries() if len(entry) == 3]  # type: ignore[misc]


class FunctionNode(Node):
    """Calls of a stateless function, whose arguments but for tensors are the same at each call.

    ``repeats``: how often the newest call was made again since, each time in a node of its own.
    """

    __slots__ = ("args", "func", "kwargs", "repeats", "view", "whole")

    def __init__(
        self,
        record: Record,
        func: Callable[..., Any],
        args: Any,
        kwargs: Any,
        arguments: int,
        view: bool,
        whole: bool = False,
    ) -> None:
        super().__init__(record, arguments, 1)
        self.func, self.args, self.kwargs, self.view, self.whole = func, args, kwargs, view, whole
        self.repeats = 0


class StackNode(FunctionNode):
    """``torch.stack`` of successive values of one result, which are one argument: ``steps``."""

    __slots__ = ("steps",)

    def __init__(self, record: Record, steps: ArgumentSeries) -> None:
        super().__init__(record, torch.stack, (), {}, 0, view=False, whole=True)
        self.steps = steps

    def let_go(self) -> None:
        super().let_go()
        self.steps.clear()

    def entries(self) -> list[Entry]:
        return self.steps.read()


class InputNode(FunctionNode):
    """Plain inputs of a layer. ``begun``: the search for events in them, where one has begun."""

    __slots__ = ("begun",)

    def __init__(self, record: Record, module: nn.Module) -> None:
        super().__init__(record, same, (), {"module": module}, 1, view=True)  # so that its id stays its own
        self.begun: Any = None

    def follow(self, x: Tensor) -> bool:
        """Note an input that is the one before again, or the next slice of the tensor of all: whether it is one."""
        record, argument = self.record, self.arguments[0]
        if record.entered():
            return False
        record.enter_lock()  # record.enter(), written out
        try:
            if record.closed:
                return False
            if type(argument) is Slices:
                if not argument.take(x):
                    return False
                if self.begun is not None:
                    self.begun.announce(argument.n)
            else:
                before, its_version = last = argument.entries[-1]
                if before is not x or version(x) != its_version or x.shape != self.shape:
                    return False
                argument.entries.append(last)
            self.order.append(record.calls)
            record.calls += 1
            return True
        finally:
            record.leave()

    def take(self, x: Tensor) -> None:
        """Note the next input, whatever it is."""
        argument = self.arguments[0]
        if type(argument) is Slices:
            self.stop()
            self.arguments[0] = argument = ArgumentSeries(argument)
        argument.append(self.record.plain.entry(x))
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
    """The function of a node of plain inputs."""
    return x


class Borrowed:
    """A tensor of the user's that recorded steps are written into, and how often it has been changed."""

    __slots__ = ("changes", "home")

    def __init__(self, home: Tensor) -> None:
        self.home, self.changes = home, 1


class WriteNode(Node):
    """Calls that write into one borrowed tensor. ``forms``: function and arguments, but for tensors, of each."""

    __slots__ = ("forms", "home")

    readable = False

    def __init__(self, record: Record, home: Tensor, arguments: int) -> None:
        super().__init__(record, arguments, 1)
        self.home, self.forms = home, list[tuple[Callable[..., Any], Any]]()
        self.shape, self.dtypes, self.device = home.shape, (home.dtype,), home.device

    def size(self) -> int:
        return self.home.numel() * self.home.element_size() + sum(a.size() for a in self.arguments)

    def let_go(self) -> None:
        super().let_go()
        self.forms = []
        del self.home


class NeuronNode(Node):
    """Successive steps of one neuron, each from the state that the one before left."""

    __slots__ = (
        *(
            "adapter",
            "config",
            "description",
            "forward",
            "given_at",
            "half",
            "initial",
            "input_dtype",
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
        half: Dtypes | None,
        description: Description | None = None,
    ) -> None:
        names = list(leaves)
        same = adapter.output_leaf(module, neuron)
        others = [name for name in names if name != same]
        super().__init__(record, 1, 1 + len(others))
        self.adapter, self.module, self.neuron, self.config = adapter, module, neuron, config
        self.upstream, self.like = upstream, like
        self.input_shape: torch.Size
        self.input_dtype: torch.dtype
        self.half = half  # what is given where half precision comes in
        self.dtypes = (torch.float32,) * (1 + len(others))
        if half is not None:
            self.dtypes = (half.out, *(half.state[name] for name in others))
        self.slots = {name: 0 if name == same else 1 + others.index(name) for name in names}
        self.named_slots, self.order_of_state = tuple(self.slots.items()), tuple(self.slots.values())
        self.forward: Any = None  # of the class, if a call of the module comes to nothing but it
        self.unmarked = False  # whether the active config is all that holds for the module
        # how many arguments a call has whose last one is the state, a single tensor apart from the output; 0: none has
        self.given_at = 0
        self.initial: dict[str, Entry | None] = {
            name: None if leaf is None else record.entry(leaf) for name, leaf in leaves.items()
        }
        self.description = Description(adapter, module) if description is None else description
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

    def replace(self, x: Tensor, other: Tensor) -> None:
        super().replace(x, other)
        for name, entry in self.initial.items():
            if entry is not None and entry[0] is x:
                self.initial[name] = (other, entry[1])

    def let_go(self) -> None:
        super().let_go()
        self.initial = {}

    def entries(self) -> list[Entry]:
        return [*super().entries(), *(entry for entry in self.initial.values() if entry is not None)]


@lru_cache(maxsize=4096)
def _is_library(name: Any) -> bool:
    return str(name).partition(".")[0] in ("torch", "snn_sparse_plugin", "snntorch", "norse")


def _users_line() -> str:
    """``file:line`` of the innermost frame that belongs to neither torch nor this package nor a neuron library."""
    frame = sys._getframe(1)
    while frame is not None:
        if not _is_library(frame.f_globals.get("__name__")):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}, in {frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return "an unknown line"
