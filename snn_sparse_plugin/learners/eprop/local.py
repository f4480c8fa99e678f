"""Local derivatives of a neuron: of one step as it runs, and of many steps at once when their chunk is over.

An elementwise neuron does not know its samples from its steps. So the steps of a chunk are run once more, several as
one large batch, and autograd differentiates that: the same derivatives at a fraction of the calls.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...core.errors import UnsupportedError
from .scan import Jacobian
from .states import SnnTorchState, TupleState
from .structure import Intercept

_ELEMENTS = 1 << 16  # of a batch of steps: what autograd keeps of it then stays in cache
_OTHER_SPIKES = 1e-3  # vectorised functions may differ in their last bit by where an element lies


def derivatives(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], wanted: set[tuple[int, int]] | None = None
) -> dict[tuple[int, int], Tensor]:
    """Elementwise derivatives of every output by every input, by (row, column); or of the wanted pairs alone."""
    found: dict[tuple[int, int], Tensor] = {}
    for row, out in enumerate(outputs):
        columns = [k for k in range(len(inputs)) if wanted is None or (row, k) in wanted]
        if out.requires_grad and columns:
            grads = torch.autograd.grad(
                out, [inputs[k] for k in columns], torch.ones_like(out), retain_graph=True, allow_unused=True
            )
            found |= {(row, k): g for k, g in zip(columns, grads, strict=True) if g is not None}
    return found


class Part(NamedTuple):
    """Local derivatives of some consecutive steps, entries (steps, B, N) or numbers."""

    steps: int
    local: Jacobian
    symbolic: bool = False  # whether every entry that is one number is given as one


class Plan(NamedTuple):
    """What the first step has shown about a neuron. Later steps are checked against it."""

    current: (
        int  # which of the currents stands for their sum: those of linear layers inside, then the outer one
    )
    currents: int
    pairs: frozenset[tuple[int, int]]  # entries of the Jacobian
    states: int


@dataclass(eq=False)
class Inputs:
    """The tensors that one step of a neuron was computed from."""

    x: Tensor
    inner: list[Tensor]  # currents of linear layers inside the neuron
    state: SnnTorchState | TupleState

    def __post_init__(self) -> None:
        self.versions = self._versions()

    def _versions(self) -> list[int]:
        return [0 if x.is_inference() else x._version for x in (self.x, *self.state.leaves)]

    def changed(self) -> bool:
        """Whether one of the tensors has been written to since."""
        return self.versions != self._versions()


def replay(
    name: str,
    module: nn.Module,
    plan: Plan,
    steps: Sequence[Inputs],
    spikes: Sequence[Tensor],
    sequence: bool,
) -> Iterator[Part]:
    """Local derivatives of steps that have run, of some at a time.

    Args:
        spikes: what the steps gave, (B, N) each.
        sequence: whether the module takes (T, B, N).

    Raises:
        UnsupportedError: the neuron does something else this time.
    """
    B, N = spikes[0].shape
    size = max(1, _ELEMENTS // (B * N))
    with unchanged(module), torch.enable_grad():
        for first in range(0, len(steps), size):
            part = steps[first : first + size]
            if any(step.changed() for step in part):
                raise UnsupportedError(
                    f"e-prop: the current or state of {name} was written to in place before its chunk was over; make "
                    "new tensors instead, or use a smaller chunk=."
                )
            rows, leaves = _run(plan, part, sequence)
            before = torch.cat(list(spikes[first : first + size]), 0)
            z = rows[0].detach().reshape(before.shape)
            if not torch.equal(z, before) and (z != before).float().mean() > _OTHER_SPIKES:
                raise UnsupportedError(
                    f"e-prop: {name} does not give the same spikes from the same current and state, so it has no "
                    "derivatives: is it random? Name it with neurons=[...], or use eprop.detached(model)."
                )
            # columns are the current and then the states
            found = derivatives(rows, leaves, set(plan.pairs))
            shape = len(part), B, N
            yield Part(len(part), {place: g.reshape(shape) for place, g in found.items()})


def _run(plan: Plan, part: Sequence[Inputs], sequence: bool) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs of a batch of steps, and what they are differentiated by."""
    x = _joined([step.x for step in part])
    inner = [_joined(each) for each in zip(*(step.inner for step in part), strict=True)]
    states = [_joined(each) for each in zip(*(step.state.leaves for step in part), strict=True)]
    current = [*inner, x][plan.current].requires_grad_()
    for value in states:
        value.requires_grad_()
    given = iter(inner)

    def linear(*args: Any, **kwargs: Any) -> Tensor:
        return next(given)

    state = part[0].state.at(x.unsqueeze(0) if sequence else x, states)
    with Intercept(linear):
        z, after = state.outputs(state.call())
    return [z, *after], [current, *states]


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts), -2) if len(parts) > 1 else parts[0].clone()


@contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """The module's attributes and buffers as they were, after what it does to them in the block."""
    attributes, buffers = dict(vars(module)), dict(module._buffers)
    try:
        yield
    finally:
        vars(module).clear()
        vars(module).update(attributes)
        module._buffers.clear()
        module._buffers.update(buffers)


def joined(parts: Sequence[Part], like: Tensor) -> Jacobian:
    """The entries of consecutive parts, (K, B, N); numbers where one holds for all neurons, samples and steps."""
    if len(parts) == 1 and parts[0].symbolic:
        return parts[0].local
    whole: Jacobian = {}
    made: dict[tuple[int, ...], Tensor] = {}  # one tensor for all places that the same ones stand at
    for place in {place for part in parts for place in part.local}:
        values = [part.local.get(place, 0.0) for part in parts]
        numbers = [_number(v, part.symbolic) for v, part in zip(values, parts, strict=True)]
        if None not in numbers and len(set(numbers)) == 1:
            whole[place] = numbers[0]  # type: ignore[assignment]
            continue
        same = tuple(id(v) for v in values)
        if same in made:
            whole[place] = made[same]
            continue
        out = made[same] = like.new_empty(sum(part.steps for part in parts), *like.shape)
        at = 0
        for part, value in zip(parts, values, strict=True):
            out[at : at + part.steps] = value
            at += part.steps
        whole[place] = out
    return whole


def _number(value: Tensor | float, symbolic: bool) -> float | None:
    """The one value of all elements, or None; a tensor is looked into unless it is known to have several."""
    if not isinstance(value, Tensor):
        return value
    if symbolic:
        return None
    low, high = torch.aminmax(value)
    return float(low) if bool(low == high) else None
