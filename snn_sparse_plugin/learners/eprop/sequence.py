"""Whole sequences: any model step by step, layers of LSNN through their own kernels."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...core.errors import InputError
from . import resume
from .blocks import LossFunction, Targets, Totals, Window, blocks
from .compiled import Network, why_not
from .stepwise import Stepwise


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
    learner: Stepwise,
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
    before = [layer.spikes for layer in learner.hidden]
    for block, wanted in blocks(x, targets, per_step, learner.block_size()):
        state = step_model(block, wanted, state, totals, on_update)
    if not totals.steps:
        raise InputError("EProp.run: the input has no steps.")
    learner.flush()
    learner.last_state = state
    # read at the end alone: a device is not waited for before
    rates = {
        layer.name: float(layer.spikes - spikes) / (totals.steps * layer.size)
        for layer, spikes in zip(learner.hidden, before, strict=True)
    }
    return RunResult(float(totals.losses), totals.output, rates, totals.steps, state, totals.stacked())


Stepper = Callable[[Any, Targets, Any, Totals, "Callable[[], Any] | None"], Any]


def _compiled(learner: Stepwise, fresh: bool) -> Stepper | None:
    """The kernels' way, where the model and the sequence so far allow it."""
    if learner.compiled is None and fresh and not why_not(learner.model, learner.engine, learner.trace_dtype):
        learner.compile()
    return None if learner.compiled is None else partial(_by_kernels, learner, learner.compiled)


def _by_kernels(
    learner: Stepwise,
    network: Network,
    block: Any,
    target: Targets,
    state: Any,
    totals: Totals,
    on_update: Any,
) -> Any:
    events, K = network.take(block, state)
    learner.check_versions()
    network.learn(events, K, target, totals)
    learner.steps_seen += K
    if learner.update != "sequence" and learner.engine != "offline":
        learner.deliver()
        if on_update is not None:
            on_update()
    return network.state()


def _stepper(learner: Stepwise) -> Stepper:
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
