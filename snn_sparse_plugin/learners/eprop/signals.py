"""Learning signals: how the loss of a step comes to the spikes of the hidden layers."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...core.errors import InputError, UnsupportedError
from .layer import WatchedLayer
from .record import Record
from .scan import Filter

log = logging.getLogger("snn_sparse_plugin")


class Signals:
    """Learning signals reach a spike in two ways: directly, where the loss uses it, and through the readout's memory.

    ``indirect`` are the layers that only other hidden layers bring signals to, None before the first loss.
    """

    def __init__(
        self, hidden: Sequence[WatchedLayer], readout: WatchedLayer, names: dict[nn.Parameter, str]
    ) -> None:
        self.hidden, self.readout, self.names = hidden, readout, names
        self.indirect: set[str] | None = None
        self._passing, self._phase = False, ""

    @property
    def approximations(self) -> tuple[str, ...]:
        """What of the gradient is not exact, in words."""
        if not self.indirect:
            return ()
        names = ", ".join(sorted(self.indirect))
        return (f"{names} learn from what reaches them through the layers above within a step",)

    def backward(self, loss: Tensor, memory: Filter | None) -> None:
        """Errors of this step's loss to readout and hidden spikes, and from the readout, with its memory, down."""
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise InputError(f"learner.step(loss): the loss must be one number, got {shape}.")
        if not loss.requires_grad:
            raise UnsupportedError(
                "learner.step(loss): the loss does not depend on this step's outputs. Where a step has no loss, call "
                "learner.step()."
            )
        self._phase = "direct"
        loss.backward()
        self._phase = "filtered"
        roots, signals = [], []
        for record in self.readout.open:
            if record.direct is not None:
                scale = _scale(record, memory)
                if isinstance(scale, float) and scale == 0:
                    raise UnsupportedError(
                        f"e-prop: readout {self.readout.name} answers a current only in the step after it; use "
                        "eprop.detached(model)."
                    )
                if scale is not None:
                    record.direct = record.direct / scale
                for below in record.below:
                    roots.append(below)
                    signals.append(record.direct)
        if not roots or self._carry_later():
            return
        learning = [x for x in self.hidden if x.learns()]
        again = self.indirect is None or bool(self.indirect)
        others = self._others() if self.indirect is None else {}
        torch.autograd.backward(roots, signals, retain_graph=again)
        reached = [name for name, before in others.items() if self._others()[name] != before]
        if reached:
            raise UnsupportedError(
                f"e-prop: {reached[0]} stands between a hidden layer and the readout, where only Linear layers learn. "
                "Freeze it, or use eprop.detached(model)."
            )
        if self.indirect is None:
            self.indirect = {x.name for x in learning if all(r.filtered is None for r in x.open)}
            if self.indirect:
                log.warning("e-prop: %s; the memory of those layers is left out", self.approximations[0])
        if self.indirect:
            self._passing = True
            try:
                torch.autograd.backward(roots, signals)
            finally:
                self._passing = False

    def _carry_later(self) -> bool:
        """Leave the way from readout to spikes to the end of the chunk, where it is known: weights and nothing else."""
        hidden = {id(r.spikes): r for x in self.hidden for r in x.open if r.spikes is not None}
        records = [r for r in self.readout.open if r.direct is not None]
        pairs = [(r, call, hidden.get(id(call.given))) for r in records for call in r.calls]
        if not all(target is not None and call.name for _, call, target in pairs):
            return False
        for record, call, target in pairs:
            target.carried.append((record, call))  # type: ignore[union-attr]
        return True

    def receive(self, layer: WatchedLayer, record: Record, grad: Tensor) -> Tensor | None:
        """A learning signal arrives at the spikes of a hidden layer; returns what goes on below."""
        if self._passing and not any(record is r for r in layer.open):
            return None  # what feeds back into a layer above came a step before
        layer.guard(record)
        if self._phase == "direct":
            record.direct = grad if record.direct is None else record.direct + grad
        elif not self._passing or layer.name in (self.indirect or ()):
            record.filtered = grad if record.filtered is None else record.filtered + grad
        return grad * record.gain() if self._passing else None

    def _others(self) -> dict[str, tuple[int, int] | None]:
        """Parameters that no layer learns, with a mark that changes with their gradient."""
        layers = [*self.hidden, self.readout]
        biases = {id(call.bias) for x in layers for r in x.open for call in r.calls}
        weights = {name for x in layers for name in x.weights}
        return {
            name: None if p.grad is None else (id(p.grad), p.grad._version)
            for p, name in self.names.items()
            if p.requires_grad and name not in weights and id(p) not in biases
        }


def _scale(record: Record, memory: Filter | None) -> float | Tensor | None:
    """What the readout's output is per unit of that which its gradient belongs to; None: one."""
    if record.at_output:
        return None
    if record.local is None:
        assert memory is not None
        scale: float | Tensor = float(memory.b[memory.out])
    else:
        scale = record.gain()
    return None if isinstance(scale, float) and scale == 1 else scale
