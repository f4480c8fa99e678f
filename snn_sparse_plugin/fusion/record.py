"""The record of a step loop: what has been called and has not run yet."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

from ..core.errors import FusionError
from .arguments import Entry
from .context import here, learns
from .description import version
from .nodes import FunctionNode, InputNode, NeuronNode, Node
from .plain import Plain
from .recorded import Recorded, Value

LONGEST = 100_000
"""Calls after which a record runs although nobody asked."""

LARGEST, LARGEST_KEPT = 32 << 20, 512 << 20
"""Bytes after which it does: without gradients, where upstream keeps nothing, and with them, where upstream keeps every
step until the backward."""

SHORTEST = 8
"""Steps of a neuron below which it does not, however large they are."""


LOOPED, AFTERWARDS = 4, 6
"""Steps of a neuron that make a loop; and calls, since the last of them or since the last stack of steps, after which
the loop is over. A call that comes once takes ten times as long recorded, and a loss may be written out in fifty of
them; a few are recorded, as other steps of the loop may still be stacked."""


class Record:
    """What one thread has recorded and not run yet.

    It is written to between :meth:`enter` and :meth:`leave`. A finalizer or signal handler that comes in between, on
    the same thread, finds it entered already: what it calls is recorded elsewhere, and it cannot run this record.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.enter_lock, self.leave, self.entered = self.lock.acquire, self.lock.release, self.lock._is_owned  # type: ignore[attr-defined]
        self.nodes: list[Node] = []
        self.functions: dict[Any, FunctionNode] = {}
        self.inputs: dict[int, InputNode] = {}  # the node of a layer's plain inputs, by the layer's id
        self.neurons: dict[int, NeuronNode] = {}  # the newest node of a module, by the module's id
        self.calls = 0
        self.stacked = 0  # the number of calls when steps were last stacked
        self.look = 64  # the number of calls from which on to ask whether it is full
        self.viewed: set[Value] = set()
        self.plain = Plain()
        self.closed = False
        self.error: BaseException | None = None

    def enter(self) -> bool:
        """Begin to write to it: whether that is possible. ``with`` the lock takes twice as long."""
        if self.entered():
            return False
        self.enter_lock()
        if self.closed:
            self.leave()
            return False
        return True

    def count(self, node: Node) -> None:
        node.order.append(self.calls)
        self.calls += 1

    def entry(self, x: Any) -> Entry:
        """What is noted for a tensor argument of a call."""
        return x._value if type(x) is Recorded else self.plain.entry(x)

    def waiting(self) -> list[tuple[Node, int, int, Recorded]]:
        """Everything in the user's hands that waits for this record: node, slot, call and tensor."""
        return [found for node in self.nodes for found in node.waiting()]

    def is_full(self) -> bool:
        """Whether it has to run before it grows; asked from ``look`` calls on."""
        if self.calls > LONGEST:
            return True
        size = sum(node.size() for node in self.nodes)
        room = (LARGEST_KEPT if any(learns(node.mode) for node in self.nodes) else LARGEST) - size
        if room <= 0 and any(len(node) >= SHORTEST for node in self.neurons.values()):
            return True
        # half as many more as there seems to be room for
        self.look = self.calls + max(32, min(LONGEST, self.calls * room // (2 * max(1, size))))
        return False

    def is_over(self) -> bool:
        """Whether its loop has ended a while ago; asked of a call that reads stacked steps alone."""
        last = [node.order[-1] for node in self.neurons.values() if len(node.order) >= LOOPED]
        return bool(last) and self.calls - max(self.stacked, *last) > AFTERWARDS

    def awaited(self) -> bool:
        """Whether anything waits for this record."""
        return any(node.waiting() for node in reversed(self.nodes))

    def close(self) -> None:
        """Let go of everything: nodes refer to each other in circles, and would keep what they made until a search
        for garbage.
        """
        self.closed = True
        for node in self.nodes:
            node.let_go()
        self.nodes.clear()
        self.functions.clear()
        self.inputs.clear()
        self.neurons.clear()
        self.plain.clear()


def check_versions(nodes: Any) -> None:
    """Raise :class:`FusionError` if a tensor was changed in place after a step that reads it was recorded."""
    for node in nodes:
        for entry in node.entries():
            if len(entry) == 2 and version(entry[0]) != entry[1]:
                raise _changed(node, "an input of the step")
        if isinstance(node, NeuronNode):
            name = node.description.changed_in_place()
            if name is not None:
                raise _changed(node, f"{name!r} of {type(node.module).__name__}")


def _changed(node: Node, what: str) -> FusionError:
    return FusionError(
        f"{what} was changed in place after the step was recorded at {node.where}, before its result was used. "
        f"Use the result first (snn_sparse_plugin.fusion.flush.flush() runs what is recorded), or switch time "
        f"fusion off (fuse_time=False, or SNN_SPARSE_FUSE=0)."
    )


reasons: Counter[str] = Counter()
"""Why records ran: the function that wanted numbers, and from where."""


def open_record() -> Record:
    """The record of this thread that takes new calls."""
    record = here.record
    if record is None or record.closed or record.entered():
        record = here.record = Record()
    return record
