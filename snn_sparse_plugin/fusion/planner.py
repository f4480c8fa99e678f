"""What is wanted of a record, and in which order its nodes can run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from ..core.precision import HALF
from .arguments import ArgumentSeries, Entry
from .context import casts
from .nodes import FunctionNode, NeuronNode, Node, same
from .recordable import LINEAR, filled
from .recorded import Recorded
from .series import piece


class Plan:
    """What is wanted of a record, and ``groups``: nodes in the order in which they can run, together where they
    feed each other in a circle."""

    def __init__(
        self,
        waiting: list[tuple[Node, int, int, Recorded]],
        watched: Sequence[Node] = (),
        stepped: bool = False,
    ) -> None:
        self.sources: dict[Node, set[Node]] = {}
        self.readers: dict[tuple[Node, int], set[Node]] = {}
        self.early: set[tuple[Node, int]] = set()  # wanted before the last call
        self.waiting: dict[tuple[Node, int], list[int]] = {}
        for node, slot, call, _ in waiting:
            self.waiting.setdefault((node, slot), []).append(call)
            if call < len(node) - 1:
                self.early.add((node, slot))
        todo = [*{node: None for node, _, _, _ in waiting}, *watched]
        while todo:
            node = todo.pop()
            if node in self.sources:
                continue
            read: dict[tuple[Node, int], int] = {}  # the first call that is read of each result
            for source, call, slot in node.values():
                if call < read.setdefault((source, slot), call):
                    read[source, slot] = call
            for (source, slot), first in read.items():
                self.readers.setdefault((source, slot), set()).add(node)
                if first < len(source) - 1:
                    self.early.add((source, slot))
            found = self.sources[node] = {source for source, _ in read}
            todo += found
        self.stepped = stepped
        self.groups = [list(self.sources)] if stepped else list(_components(self.sources))
        self.alone = {group[0] for group in self.groups if len(group) == 1 and not stepped}
        self.inside = {
            node for node in self.sources if isinstance(node, FunctionNode) and self._runs_inside(node)
        }

    def feeds_itself(self, node: Node) -> bool:
        return node in self.sources[node]

    def _runs_inside(self, node: FunctionNode) -> bool:
        """Whether this is a linear layer that runs within the calls of the neurons it feeds."""
        readers = self.readers.get((node, 0), set())
        if (
            node.func is not LINEAR
            or not readers
            or ((node, 0) in self.waiting and len(self.waiting[node, 0]) > 2)
        ):
            return False
        if casts(node.mode) or node.dtypes[0] in HALF:  # torch's own product: its rounding decides who spikes
            return False
        if len(node) < 2 or len(node.shape) != 2 or node not in self.alone or self.feeds_itself(node):
            return False
        if any(self._varies(argument) for argument in node.arguments[1:]) or node.kwargs:
            return False
        return all(
            isinstance(reader, NeuronNode)
            and reader in self.alone
            and len(reader) > 1
            and reader.neuron.input_weight is None
            and not self.wants_currents(reader)
            and reader.arguments[0].range() is not None
            and reader.mode == node.mode
            for reader in readers
        )

    def wants_currents(self, node: NeuronNode) -> bool:
        """Whether a state other than the membrane is wanted between steps, which is in no output of the op."""
        outputs = (0, node.slots.get(node.adapter.membrane_leaf()))
        return any((node, slot) in self.early for slot in node.slots.values() if slot not in outputs)

    def piece(self, entry: Entry) -> Tensor:
        """One tensor argument of one call."""
        if len(entry) == 3 and entry[0] in self.inside:
            return self.own(entry[0], entry[2], [entry[1]])[0]
        return piece(entry)

    @staticmethod
    def _varies(argument: ArgumentSeries) -> bool:
        first = argument[0]
        return len(first) == 3 or any(entry is not first and entry[0] is not first[0] for entry in argument)

    def wants_events(self, node: NeuronNode) -> bool:
        """Whether the node's spikes reach weights of the fused op as they are."""
        readers = self.readers.get((node, 0), set())
        return bool(readers) and all(
            reader in self.inside
            or (
                isinstance(reader, NeuronNode)
                and reader.neuron.input_weight is not None
                and len(reader) > 1
                and reader in self.alone
                and not any(e is not None and e[0] is node for e in reader.initial.values())
            )
            for reader in readers
        )

    def is_last(self, node: NeuronNode) -> bool:
        """Whether no other neuron is reached from this one's spikes."""
        seen: set[Node] = set()
        todo = list(self.readers.get((node, 0), ()))
        while todo:
            reader = todo.pop()
            if isinstance(reader, NeuronNode) and reader is not node:
                return False
            if reader not in seen:
                seen.add(reader)
                for slot in range(len(reader.given)):
                    todo += self.readers.get((reader, slot), ())
        return True

    def own(self, node: Node, slot: int, calls: list[int]) -> list[Tensor]:
        """Values of these calls in memory of their own."""
        if node in self.inside:
            return [self.call(node, [piece(c[call]) for c in node.arguments], call) for call in calls]
        return node.results[slot].own(calls)

    @staticmethod
    def call(node: Node, tensors: list[Any], call: int) -> Tensor:
        """One call of a function, by itself."""
        assert isinstance(node, FunctionNode)
        given = [
            piece(argument[call]) if x is None else x
            for argument, x in zip(node.arguments, tensors, strict=True)
        ]
        if node.func is same:
            return given[0].view_as(given[0])
        kwargs = {name: filled(form, given) for name, form in node.kwargs.items()}
        out: Tensor = node.func(*filled(node.args, given), **kwargs)
        # what a function returns as it is may be in somebody's hands
        return out.view_as(out) if any(out is x for x in given) else out


def _components(sources: dict[Node, set[Node]]) -> Iterator[list[Node]]:
    """Strongly connected nodes, sources first [Tarjan 1972], without recursion."""
    index: dict[Node, int] = {}
    low: dict[Node, int] = {}
    stack: list[Node] = []
    on_stack: set[Node] = set()
    for root in sources:
        if root in index:
            continue
        index[root] = low[root] = len(index)
        stack.append(root)
        on_stack.add(root)
        work = [(root, iter(sources[root]))]
        while work:
            node, rest = work[-1]
            for source in rest:
                if source not in index:
                    index[source] = low[source] = len(index)
                    stack.append(source)
                    on_stack.add(source)
                    work.append((source, iter(sources[source])))
                    break
                if source in on_stack:
                    low[node] = min(low[node], index[source])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == index[node]:
                    group: list[Node] = []
                    while not group or group[-1] is not node:
                        group.append(stack.pop())
                        on_stack.discard(group[-1])
                    yield group
