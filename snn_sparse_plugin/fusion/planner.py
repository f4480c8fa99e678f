"""What is wanted of a record, and in which order its nodes can run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from torch import Tensor

from ..core.convolution import Pool
from ..core.host import is_device
from ..core.precision import HALF
from ..ops.spiking_conv import Norm
from .arguments import ArgumentSeries, Entry
from .context import casts
from .convolutions import (
    POOLS,
    TAKEN,
    Convolved,
    fits,
    is_even,
    keeps_samples,
    norm_recorded,
    pool_recorded,
    recorded,
)
from .nodes import FunctionNode, NeuronNode, Node, StackNode, WriteNode, same
from .recordable import LINEAR, Placeholder, filled
from .recorded import Recorded
from .series import piece

V = TypeVar("V")


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
        functions = [node for node in self.sources if isinstance(node, FunctionNode)]
        self.convolved = _filled({node: self._convolved(node) for node in functions})
        # each behind its convolution, with which it runs
        self.normed = _filled({node: self._norm_behind(node) for node in functions})
        self.pooled = _filled({node: self._pool_behind(node) for node in functions})
        self.inside: set[Node] = {node for node in functions if self._runs_inside(node)}
        self.spike_pools = _filled({node: self._pool_of_spikes(node) for node in functions})
        self.inside |= {node.arguments[0].read()[0][0] for node in (*self.normed, *self.pooled)}
        self.readers_of: dict[Node, set[Node]] = {node: set() for node in self.sources}
        for (source, _), readers in self.readers.items():
            self.readers_of[source] |= readers
        self.unread = {node: set(readers) for node, readers in self.readers_of.items()}
        self.config = next((node.config for node in self.sources if isinstance(node, NeuronNode)), None)

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

    def _convolved(self, node: FunctionNode) -> Convolved | None:
        """The convolution of spikes that a node is; None where torch runs what it is."""
        found = recorded(node.func, node.args, node.kwargs)
        if found is None or len(node) < 2 or node not in self.alone or self.feeds_itself(node):
            return None
        if casts(node.mode) or any(self._varies(argument) for argument in node.arguments[1:]):
            return None
        given = [argument[0][0] for argument in node.arguments]
        weight = given[found.weight.index]
        bias = given[found.bias.index] if isinstance(found.bias, Placeholder) else None
        # a step without a batch has one dimension less
        batched = isinstance(weight, Tensor) and len(node.shape) == weight.dim()
        if not batched or node.dtypes[0] not in TAKEN or not is_even(found, weight.shape[2:]):
            return None
        return found._replace(weight=weight, bias=bias)

    def _pool_behind(self, node: FunctionNode) -> Pool | None:
        """The pool that a node is, if it alone reads all of a convolution of spikes, or of the batch norm of one."""
        if len(node.arguments) != 1 or node.func not in POOLS:
            return None
        of = self._read_by_none_but(node)
        if of is None or not (of in self.convolved or of in self.normed):
            return None
        pool = pool_recorded(node.func, node.args, node.kwargs)
        return pool if pool is not None and len(pool.kernel) == len(of.shape) - 2 else None

    def _norm_behind(self, node: FunctionNode) -> Norm | None:
        """The batch norm by running statistics that a node is, if it alone reads all of a convolution of spikes."""
        found = norm_recorded(node.func, node.args, node.kwargs)
        of = None if found is None else self._read_by_none_but(node)
        if found is None or of not in self.convolved:
            return None
        if casts(node.mode) or any(self._varies(argument) for argument in node.arguments[1:]):
            return None
        norm = Norm(*filled(tuple(found), [argument[0][0] for argument in node.arguments]))
        return norm if fits(norm, self.convolved[of].weight) else None

    def _read_by_none_but(self, node: Node) -> Node | None:
        """What a node reads first, at every one of its calls, if nothing else wants it."""
        source = node.arguments[0].range()
        if len(node) < 2 or node not in self.alone or source is None or len(node) != len(source[0]):
            return None
        of = source[0]
        wanted = self.readers[of, 0] != {node} or (of, 0) in self.waiting
        return None if wanted or of.mode != node.mode else of

    def _pool_of_spikes(self, node: FunctionNode) -> Pool | None:
        """The pool that a node is, of spikes if a neuron or an input makes what it reads."""
        if node.func not in POOLS or node in self.pooled or len(node) < 2 or node not in self.alone:
            return None
        if len(node.arguments) != 1 or is_device(node.device) or node.dtypes[0] not in TAKEN:
            return None
        pool = pool_recorded(node.func, node.args, node.kwargs)
        batched = pool is not None and len(node.shape) == len(pool.kernel) + 2
        return pool if batched else None

    def reshapes(self, node: Node) -> bool:
        """Whether it gives samples another shape, so that what are events stay events."""
        if not isinstance(node, FunctionNode) or len(node.arguments) != 1 or node not in self.alone:
            return False
        source = node.arguments[0].range()
        return source is not None and keeps_samples(node.func, source[0].shape, node.shape)

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

    def wants_events(self, node: Node) -> bool:
        """Whether what the node makes reaches weights of the fused op as it is."""
        readers = self.readers.get((node, 0), set())
        return bool(readers) and all(
            reader in self.inside
            or reader in self.convolved
            or ((reader in self.spike_pools or self.reshapes(reader)) and self.wants_events(reader))
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

    def ran(self, group: list[Node]) -> None:
        """Let go of what only these nodes were still to read: the currents of convolutions are most of the memory."""
        for node in group:
            for source in self.sources[node]:
                self.unread[source].discard(node)
                if self.unread[source] or any(
                    (source, slot) in self.waiting for slot in range(len(source.results))
                ):
                    continue
                if not any(
                    reader in self.inside or reads_again(reader) for reader in self.readers_of[source]
                ):
                    source.results[:] = [None] * len(source.results)

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


def reads_again(node: Node) -> bool:
    """Whether it reads its arguments when all nodes have run: to write, or to make a view of what the user holds."""
    return isinstance(node, StackNode | WriteNode) or (isinstance(node, FunctionNode) and node.view)


def _filled(found: dict[FunctionNode, V | None]) -> dict[Node, V]:
    return {node: x for node, x in found.items() if x is not None}


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
