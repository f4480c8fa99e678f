"""What a node made, for all its calls together or one by one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.spikes import SpikeTrain
from .arguments import ArgumentSeries, Entry, Slices
from .context import in_mode_of


class Series:
    """The ``n`` values of one result of a node, in the form in which they were made.

    ``constant``: the same at every call; ``dense``: (n, ...); ``train``: events; ``pieces``: one by one;
    ``last``: only the last one is known.
    """

    __slots__ = ("_steps", "constant", "dense", "given", "last", "n", "pieces", "train")

    def __init__(
        self,
        n: int,
        *,
        constant: Tensor | None = None,
        dense: Tensor | None = None,
        train: SpikeTrain | None = None,
        pieces: list[Tensor] | None = None,
        last: Tensor | None = None,
    ) -> None:
        self.n, self.constant, self.dense, self.train = n, constant, dense, train
        self.pieces, self.last = pieces, last
        self.given = 0  # how often the dense tensor was read
        self._steps: tuple[Tensor, ...] | None = None

    def stacked(self, start: int, n: int) -> Tensor:
        """(n, ...): calls ``start`` to ``start + n``."""
        if self.constant is not None:
            return self.constant.expand(n, *self.constant.shape)
        if self.pieces is not None:
            return torch.stack(self.pieces[start : start + n])
        if self.last is not None and self.dense is None and self.train is None:
            return self.last.unsqueeze(0)
        self._densify()
        assert self.dense is not None
        self.given += 1
        return self.dense if n == self.n else self.dense[start : start + n]

    def step(self, call: int) -> Tensor:
        """The value of one call, which may share memory with others."""
        if self.constant is not None:
            return self.constant
        if self.pieces is not None:
            return self.pieces[call]
        if self.last is not None and call == self.n - 1:
            return self.last
        if self.dense is None and self._steps is None and self.train is not None:
            return self.train.step(call)
        if self._steps is None:
            self._densify()
            assert self.dense is not None
            self.given += 1
            # one node of the graph for all steps: indexing has a backward of the whole size for each
            with in_mode_of(self.dense):
                self._steps = self.dense.unbind(0)
        return self._steps[call]

    def own(self, calls: list[int]) -> list[Tensor]:
        """The values of these calls, each in memory of its own, as the step loop makes them."""
        if self.train is not None and self.dense is None and len(calls) > 2:
            self._densify()
        if self.pieces is not None:
            return [self.pieces[call] for call in calls]
        if self.dense is None or self.constant is not None or 2 * len(calls) < self.n:
            return [self._owned(call) for call in calls]
        self.given += 1
        with in_mode_of(self.dense):  # all at once: to copy each by itself takes three times as long
            copies: Any = torch.unbind_copy(self.dense, 0)  # type: ignore[func-returns-value]
        return [self._owned(call) if self._alone(call) else copies[call] for call in calls]

    def _owned(self, call: int) -> Tensor:
        x, alone = self.step(call), self._alone(call)
        events = self.train is not None and self.dense is None and not alone
        # upstream's own resets detach states in place, which a view refuses
        return x if (alone or events) and not x._is_view() else x.clone()

    def _alone(self, call: int) -> bool:
        """Whether the value of this call stands in memory of its own."""
        return self.last is not None and call == self.n - 1

    def _densify(self) -> None:
        if self.dense is None and self.train is not None:
            with in_mode_of(self.train):
                self.dense = self.train.to_dense()


def piece(entry: Entry) -> Tensor:
    """One tensor argument of one call."""
    if len(entry) == 2:
        return entry[0]
    node, call, slot = entry
    return node.results[slot].step(call)


def constant_of(argument: ArgumentSeries) -> Tensor | None:
    """The tensor that an argument is at every call, else None."""
    if isinstance(argument, Slices):
        return None
    first = argument[0]
    if argument.range() is not None:
        series = first[0].results[first[2]]
        if series is None or (series.constant is None and len(argument) > 1):
            return None
        return series.step(first[1])  # type: ignore[no-any-return]
    if len(first) == 3:
        series = first[0].results[first[2]]
        same = all(len(e) == 3 and e[0] is first[0] and e[2] == first[2] for e in argument)
        if same and series is not None and series.constant is not None:
            return series.constant
        same = same and all(e[1] == first[1] for e in argument)
        return piece(first) if same and series is not None else None
    return first[0] if all(len(e) == 2 and _same(e[0], first[0]) for e in argument) else None


def _same(a: Tensor, b: Tensor) -> bool:
    if a is b:
        return True
    return (
        not (a.requires_grad or b.requires_grad)
        and a.data_ptr() == b.data_ptr()
        and a.shape == b.shape
        and a.stride() == b.stride()
        and a.dtype == b.dtype
        and a.device == b.device
        and a.numel() > 0
    )


def stacked(argument: ArgumentSeries) -> Tensor:
    """(n, ...): the tensors of an argument; a view where they are slices of one tensor."""
    source = argument.range()
    if source is not None:
        node, start, slot = source
        return node.results[slot].stacked(start, len(argument))
    slices = Slices.of(argument)
    return torch.stack([piece(entry) for entry in argument]) if slices is None else slices.whole()


def train_of(argument: ArgumentSeries) -> SpikeTrain | None:
    """The events of an argument, where they are events."""
    source = argument.range()
    if source is not None:
        series = source[0].results[source[2]]
        whole = source[1] == 0 and len(argument) == series.n
        return series.train if whole else None
    step = getattr(argument[0][0], "_snn_step", None)
    if step is None or len(argument) != step[0].T:
        return None
    for t, entry in enumerate(argument):
        found = getattr(entry[0], "_snn_step", None)
        if found is None or found[0] is not step[0] or found[1] != t:
            return None
    return step[0]
