"""What a layer remembers of a step until its chunk is over."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from .local import Inputs
from .scan import Jacobian
from .taps import Call


@dataclass(eq=False)
class Record:
    """One step of one layer."""

    local: Jacobian | None  # None: found later, from ``inputs``
    calls: list[Call]
    z: Tensor
    states: int
    below: list[Tensor] = field(default_factory=list)  # its currents, with their graph to the layers below
    filtered: Tensor | None = None
    direct: Tensor | None = None
    inputs: Inputs | None = None
    spikes: Tensor | None = None  # as the model sees them, where they are a leaf
    carried: list[tuple[Record, Call]] = field(
        default_factory=list
    )  # what the readout will send to these spikes
