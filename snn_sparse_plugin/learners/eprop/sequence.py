"""Whole sequences: any model step by step, layers of LSNN through their own kernels."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ...core.errors import InputError
from ...core.spikes import SpikeTrain, as_spike_train, is_sparse_input
from . import resume

if TYPE_CHECKING:
    from .learner import EProp

LossFunction = Callable[[Any, Any], Tensor]


class RunResult(NamedTuple):
    """What :meth:`EProp.run` returns.

    ``loss`` is summed over steps; ``output`` is the sum of the outputs over steps, (B, C); ``spikes`` are the spikes of
    every hidden layer per neuron and step; ``outputs`` is (T, B, C) if asked for.
    """

    loss: float
    output: Tensor
    spikes: dict[str, float]
    steps: int
    state: Any
    outputs: Tensor | None = None


def run(
    learner: EProp,
    x: Any,
    loss_fn: LossFunction,
    targets: Any,
    *,
    per_step: bool,
    fresh: bool,
    state: Any,
    on_update: Callable[[], Any] | None,
    keep_outputs: bool,
) -> RunResult:
    """See :meth:`EProp.run`."""
    if fresh:
        learner.reset()
        resume.forget_hidden(learner)
    elif state is None:
        state = learner.last_state
    totals = Totals(loss_fn, keep_outputs)
    step_model = _compiled(learner, fresh) or _stepper(learner)
    before = {name: count for name, (count, _) in learner.spike_counts().items()}
    for block, wanted in blocks(x, targets, per_step, learner.block_size()):
        state = step_model(block, wanted, state, totals, on_update)
    if not totals.steps:
        raise InputError("EProp.run: the input has no steps.")
    learner.flush()
    learner.last_state = state
    rates = {
        name: (count - before[name]) / (totals.steps * size)
        for name, (count, size) in learner.spike_counts().items()
    }
    return RunResult(float(totals.losses), totals.output, rates, totals.steps, state, totals.stacked())


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
        """The sum of the losses of some steps, from outputs (K, B, C) that hang on nothing else."""
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


Stepper = Callable[[Any, Targets, Any, Totals, "Callable[[], Any] | None"], Any]


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


def _compiled(learner: EProp, fresh: bool) -> Stepper | None:
    """The kernels' way, where the model and the sequence so far allow it."""
    from .compiled import why_not

    if learner.compiled is None and fresh and not why_not(learner):
        learner.compile()
    return None if learner.compiled is None else learner.compiled.block


def _stepper(learner: EProp) -> Stepper:
    takes_state = "state" in inspect.signature(type(learner.model).forward).parameters
    sequence = any(layer.takes_sequence() for layer in learner.layers)

    def call(x: Tensor, state: Any) -> tuple[Any, Any]:
        if not takes_state:
            return learner.model(x), None
        return learner.model(x, state)  # type: ignore[no-any-return]

    def by_step(block: Any, target: Targets, state: Any, totals: Totals, on_update: Any) -> Any:
        for t, x in enumerate(_dense(block)):
            out, state = call(x, state)
            if learner.step(totals.add(out, target(t))) and on_update is not None:
                on_update()
        return state

    def by_block(block: Any, target: Targets, state: Any, totals: Totals, on_update: Any) -> Any:
        out, state = call(torch.stack(list(_dense(block))), state)
        loss = torch.stack([totals.add(y, target(t)) for t, y in enumerate(out)]).sum()
        if learner.step(loss) and on_update is not None:
            on_update()
        return state

    return by_block if sequence else by_step


def _dense(block: Tensor | Window) -> Iterator[Tensor]:
    if isinstance(block, Tensor):
        yield from block
    else:
        for t in range(block.start, block.stop):
            yield block.train.step(t)
