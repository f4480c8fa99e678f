"""The canonical neuron's step: the one place of its equations, on tensors, and as equations traced from it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from torch import Tensor

from .dynamics import PARAM_NAMES, NeuronSpec
from .equations import Equations

Spike = Callable[[Tensor], Tensor]


def step(
    spec: NeuronSpec,
    params: Tensor,
    x: Tensor,
    rec: Tensor | None,
    v: Tensor,
    i: Tensor | None,
    spike: Spike,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """One step of the canonical neuron, in upstream's order of operations: -> (u - threshold, spikes, v, i)."""
    mem, syn, threshold, leak, reset_value = params
    reset: Any = None  # R: what was above threshold before the update resets now
    if spec.reset != "none" and spec.timing != "immediate":
        reset = ((v - threshold) > 0).to(v.dtype).detach()

    if spec.update == "decay":
        if reset is not None and spec.reset == "zero" and spec.scope == "state":
            v = (1 - reset) * v
        if spec.synapse:
            assert i is not None
            i = syn * i + x if rec is None else syn * i + x + rec
            u = mem * v + i
        else:
            u = mem * v + x if rec is None else mem * v + x + rec
        if reset is not None and spec.reset == "subtract":
            u = u - reset * threshold
        elif reset is not None and spec.scope == "sum":
            u = u - reset * u
    elif spec.update == "euler":
        assert i is not None
        jump = i + x if rec is None else i + x + rec
        u = v + mem * ((leak - v) + jump)
        i = jump + -syn * jump
    else:
        x = x if rec is None else x + rec
        u = v + mem * (x + leak - v)

    if not spec.spiking:
        return u, u, u, i
    distance = u - threshold
    s = spike(distance)
    v = u
    if spec.reset != "none" and spec.timing != "delayed":
        z = s if spec.attached else s.detach()
        if spec.timing == "corrected":
            z = z - reset
            v = u - z * threshold if spec.reset == "subtract" else u - z * u
        elif spec.reset == "subtract":
            v = (1 - z) * u + z * (u - threshold)
        else:
            v = (1 - z) * u + z * (reset_value if spec.reset == "value" else 0.0)
    return distance, s, v, i


@cache
def traced(spec: NeuronSpec, recurrent: bool) -> Equations:
    """A member of the canonical family as equations: what its specification does to symbols.

    Example:
        >>> print(traced(NeuronSpec(reset="none"), False).text)
        v_next = ((mem * v) + x)
        s = spike((((mem * v) + x) - threshold))
        v = v_next
    """
    names: Any = [_Symbol(name) for name in PARAM_NAMES]
    states = ("v", "i") if spec.synapse else ("v",)
    x, rec, v, i = (_Symbol(name) for name in ("x", "rec", "v", "i"))
    _, s, *after = step(
        spec,
        names,
        x,  # type: ignore[arg-type]
        rec if recurrent else None,  # type: ignore[arg-type]
        v,  # type: ignore[arg-type]
        i if spec.synapse else None,  # type: ignore[arg-type]
        lambda x: _Symbol(f"spike({x})"),  # type: ignore[arg-type, return-value]
    )
    lines = [f"{name}_next = {value}" for name, value in zip(states, after, strict=False)]
    lines += [f"s = {s}"] if spec.spiking else []
    # all states advance at once
    return Equations("\n".join(lines + [f"{name} = {name}_next" for name in states]), states)


class _Symbol:
    """Stands for a tensor, and remembers what is done to it."""

    dtype = None

    def __init__(self, text: str) -> None:
        self.text = text

    def __str__(self) -> str:
        return self.text

    def __add__(self, other: Any) -> _Symbol:
        return _Symbol(f"({self} + {other})")

    def __sub__(self, other: Any) -> _Symbol:
        return _Symbol(f"({self} - {other})")

    def __rsub__(self, other: Any) -> _Symbol:
        return _Symbol(f"({other} - {self})")

    def __mul__(self, other: Any) -> _Symbol:
        return _Symbol(f"({self} * {other})")

    def __neg__(self) -> _Symbol:
        return _Symbol(f"(-{self})")

    def __gt__(self, zero: int) -> _Symbol:
        return _Symbol(f"above({self})")

    def to(self, dtype: None) -> _Symbol:
        return self

    def detach(self) -> _Symbol:
        return _Symbol(f"detach({self})")
