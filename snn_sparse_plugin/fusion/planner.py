"""What is wanted of a record, and in which order its lanes can run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from .columns import Column, Entry
from .record import FunctionLane, Lane, NeuronLane, same
from .recordable import LINEAR, filled
from .recorded import Recorded
from .series import piece


class Plan:
    """What is wanted of a record, and ``groups``: lanes in the order in which they can run, together where they
    feed each other in a circle."""

    def __init__(
        self,
        waiting: list[tuple[Lane, int, int, Recorded]],
        watched: Sequence[Lane] = (),
        stepped: bool = False,
    ) -> None:
        self.sources: dict[Lane, set[Lane]] = {}
        self.readers: dict[tuple[Lane, int], set[Lane]] = {}
        self.early: set[tuple[Lane, int]] = set()  # wanted before the last call
        self.waiting: dict[tuple[Lane, int], list[int]] = {}
        for lane, slot, call, _ in waiting:
            self.waiting.setdefault((lane, slot), []).append(call)
            if call < len(lane) - 1:
                self.early.add((lane, slot))
        todo = [*{lane: None for lane, _, _, _ in waiting}, *watched]
        while todo:
            lane = todo.pop()
            if lane in self.sources:
                continue
            read: dict[tuple[Lane, int], int] = {}  # the first call that is read of each result
            for source, call, slot in lane.values():
                if call < read.setdefault((source, slot), call):
                    read[source, slot] = call
            for (source, slot), first in read.items():
                self.readers.setdefault((source, slot), set()).add(lane)
                if first < len(source) - 1:
                    self.early.add((source, slot))
            found = self.sources[lane] = {source for source, _ in read}
            todo += found
        self.stepped = stepped
        self.groups = [list(self.sources)] if stepped else list(_components(self.sources))
        self.alone = {group[0] for group in self.groups if len(group) == 1 and not stepped}
        self.inside = {
            lane for lane in self.sources if isinstance(lane, FunctionLane) and self._runs_inside(lane)
        }

    def feeds_itself(self, lane: Lane) -> bool:
        return lane in self.sources[lane]

    def _runs_inside(self, lane: FunctionLane) -> bool:
        """Whether this is a linear layer that runs within the calls of the neurons it feeds."""
        readers = self.readers.get((lane, 0), set())
        if (
            lane.func is not LINEAR
            or not readers
            or ((lane, 0) in self.waiting and len(self.waiting[lane, 0]) > 2)
        ):
            return False
        if len(lane) < 2 or len(lane.shape) != 2 or lane not in self.alone or self.feeds_itself(lane):
            return False
        if any(self._varies(column) for column in lane.columns[1:]) or lane.kwargs:
            return False
        return all(
            isinstance(reader, NeuronLane)
            and reader in self.alone
            and len(reader) > 1
            and reader.neuron.input_weight is None
            and not self.wants_currents(reader)
            and reader.columns[0].range() is not None
            and reader.mode == lane.mode
            for reader in readers
        )

    def wants_currents(self, lane: NeuronLane) -> bool:
        """Whether a state other than the membrane is wanted between steps, which is in no output of the op."""
        outputs = (0, lane.slots.get(lane.adapter.membrane_leaf()))
        return any((lane, slot) in self.early for slot in lane.slots.values() if slot not in outputs)

    def piece(self, entry: Entry) -> Tensor:
        """One tensor argument of one call."""
        if len(entry) == 3 and entry[0] in self.inside:
            return self.own(entry[0], entry[2], [entry[1]])[0]
        return piece(entry)

    @staticmethod
    def _varies(column: Column) -> bool:
        first = column[0]
        return len(first) == 3 or any(entry is not first and entry[0] is not first[0] for entry in column)

    def wants_events(self, lane: NeuronLane) -> bool:
        """Whether the lane's spikes reach weights of the fused op as they are."""
        readers = self.readers.get((lane, 0), set())
        return bool(readers) and all(
            reader in self.inside
            or (
                isinstance(reader, NeuronLane)
                and reader.neuron.input_weight is not None
                and len(reader) > 1
                and reader in self.alone
                and not any(e is not None and e[0] is lane for e in reader.initial.values())
            )
            for reader in readers
        )

    def is_last(self, lane: NeuronLane) -> bool:
        """Whether no other neuron is reached from this one's spikes."""
        seen: set[Lane] = set()
        todo = list(self.readers.get((lane, 0), ()))
        while todo:
            reader = todo.pop()
            if isinstance(reader, NeuronLane) and reader is not lane:
                return False
            if reader not in seen:
                seen.add(reader)
                for slot in range(len(reader.given)):
                    todo += self.readers.get((reader, slot), ())
        return True

    def own(self, lane: Lane, slot: int, calls: list[int]) -> list[Tensor]:
        """Values of these calls in memory of their own."""
        if lane in self.inside:
            return [self.call(lane, [piece(c[call]) for c in lane.columns], call) for call in calls]
        return lane.results[slot].own(calls)

    @staticmethod
    def call(lane: Lane, tensors: list[Any], call: int) -> Tensor:
        """One call of a function, by itself."""
        assert isinstance(lane, FunctionLane)
        given = [
            piece(column[call]) if x is None else x for column, x in zip(lane.columns, tensors, strict=True)
        ]
        if lane.func is same:
            return given[0].view_as(given[0])
        kwargs = {name: filled(form, given) for name, form in lane.kwargs.items()}
        out: Tensor = lane.func(*filled(lane.args, given), **kwargs)
        # what a function returns as it is may be in somebody's hands
        return out.view_as(out) if any(out is x for x in given) else out


def _components(sources: dict[Lane, set[Lane]]) -> Iterator[list[Lane]]:
    """Strongly connected lanes, sources first [Tarjan 1972], without recursion."""
    index: dict[Lane, int] = {}
    low: dict[Lane, int] = {}
    stack: list[Lane] = []
    on_stack: set[Lane] = set()
    for root in sources:
        if root in index:
            continue
        index[root] = low[root] = len(index)
        stack.append(root)
        on_stack.add(root)
        work = [(root, iter(sources[root]))]
        while work:
            lane, rest = work[-1]
            for source in rest:
                if source not in index:
                    index[source] = low[source] = len(index)
                    stack.append(source)
                    on_stack.add(source)
                    work.append((source, iter(sources[source])))
                    break
                if source in on_stack:
                    low[lane] = min(low[lane], index[source])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[lane])
                if low[lane] == index[lane]:
                    group: list[Lane] = []
                    while not group or group[-1] is not lane:
                        group.append(stack.pop())
                        on_stack.discard(group[-1])
                    yield group
