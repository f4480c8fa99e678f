"""What a layer remembers of a step until its chunk is over."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from .local import Inputs
from .scan import Jacobian
from .stepper import Place
from .taps import Call


@dataclass(eq=False)
class Record:
    """One step of one layer."""

    local: Jacobian | None  # None: found later, from ``inputs``, or stands at ``place``
    calls: list[Call]
    z: Tensor
    states: int
    below: list[Tensor] = field(default_factory=list)  # its currents, with their graph to the layers below
    filtered: Tensor | None = None
    direct: Tensor | None = None
    inputs: Inputs | None = None
    place: Place | None = None
    at_output: bool = False  # a readout whose ``direct`` acts on its output, not on its current
    spikes: Tensor | None = None  # as the model sees them, where they are a leaf
    carried: list[tuple[Record, Call]] = field(
        default_factory=list
    )  # what the readout will send to these spikes

    def jacobian(self) -> Jacobian:
        """The derivatives, where they are known as soon as the step has run."""
        return self.place.local() if self.place is not None else self.local or {}

    def gain(self) -> Tensor | float:
        """The derivative of the output by the current, (B, N)."""
        return self.place.gain() if self.place is not None else self.jacobian().get((0, 0), 0.0)
