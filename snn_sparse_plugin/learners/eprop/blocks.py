"""A sequence in blocks of steps, with its targets, and what a run adds up over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...core.errors import InputError
from ...core.spikes import SpikeTrain, as_spike_train, is_sparse_input

LossFunction = Callable[[Any, Any], Tensor]
Targets = Callable[[int], Any]


class Totals:
    """Losses and outputs of a run so far."""

    def __init__(self, loss_fn: LossFunction, keep: bool) -> None:
        self.loss_fn = loss_fn
        self.steps = 0
        self.losses, self.output = torch.zeros((), dtype=torch.float64), torch.zeros(())
        self.kept: list[Tensor] | None = [] if keep else None

    def add(self, output: Any, target: Any) -> Tensor:
        """The loss of one step."""
        loss = self.loss_fn(output, target)
        self.losses = self.losses.to(loss.device) + loss.detach()
        self.steps += 1
        if isinstance(output, Tensor):
            self.output = self.output.to(output.device) + output.detach()
            if self.kept is not None:
                self.kept.append(output.detach())
        return loss

    def add_all(self, outputs: Tensor, target: Targets) -> Tensor:
        """The sum of the losses of some steps, from outputs (K, B, C) without a graph."""
        losses = [self.loss_fn(y, target(t)) for t, y in enumerate(outputs.unbind(0))]
        loss = torch.stack(losses).sum()
        self.losses = self.losses + loss.detach()
        self.steps += len(losses)
        self.output = self.output + outputs.detach().sum(0)
        if self.kept is not None:
            self.kept.extend(outputs.detach().unbind(0))
        return loss

    def stacked(self) -> Tensor | None:
        return torch.stack(self.kept) if self.kept else None


def blocks(x: Any, targets: Any, per_step: bool, size: int) -> Iterator[tuple[Any, Targets]]:
    """Blocks of at most ``size`` steps, dense or SpikeTrain, each with its targets by step of the block."""
    whole = isinstance(x, Tensor | SpikeTrain) or is_sparse_input(x)
    for part in [x] if whole else x:
        goal = targets
        if not whole and isinstance(part, tuple):
            part, goal = part
        if is_sparse_input(part):
            part = as_spike_train(part)
        elif not (isinstance(part, Tensor) and part.dim() >= 3):
            shape = tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__
            raise InputError(f"EProp.run: expected (T, B, …) or blocks of that form, got {shape}.")
        T = part.shape[0]
        if per_step and len(goal) < T:
            raise InputError(f"EProp.run: {T} steps, but targets for {len(goal)}.")
        for start in range(0, T, size):
            stop = min(start + size, T)

            def target(t: int, start: int = start, goal: Any = goal) -> Any:
                return goal[start + t] if per_step else goal

            yield _cut(part, start, stop), target


class Window(NamedTuple):
    """Some steps of a train, without a copy."""

    train: SpikeTrain
    start: int
    stop: int


def _cut(x: Tensor | SpikeTrain, start: int, stop: int) -> Tensor | Window:
    return x[start:stop] if isinstance(x, Tensor) else Window(x, start, stop)
