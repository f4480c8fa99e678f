"""The canonical neuron family: which equations a layer runs, without any tensor.

One step, from state (v, i) and input x (upstream's order of float operations is kept, see ``step`` in
``core/canonical.py``)::

    decay   i' = syn * i + x          u = mem * v + i'               (no synapse: i' = x)
    euler   j  = i + x                u = v + mem * ((leak - v) + j),   i' = j - syn * j
    box                               u = v + mem * ((x + leak) - v)

    s = 1[u - threshold > 0]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from .errors import ConfigError

UPDATES = ("decay", "euler", "box")
RESETS = ("none", "subtract", "zero", "value")
TIMINGS = ("delayed", "immediate", "corrected")
SCOPES = ("state", "sum")


@dataclass(frozen=True)
class NeuronSpec:
    """Which member of the canonical family a layer is. Static and hashable: kernels specialise on it.

    Args:
        update: ``"decay"`` (snnTorch: ``mem * v + x``), ``"euler"`` or ``"box"`` (Norse's LIF and LIFBox).
        synapse: whether a synaptic current ``i`` is part of the state.
        reset: ``"none"``, ``"subtract"`` the threshold, to ``"zero"`` or to a ``"value"``.
        timing: ``"delayed"``: a spike resets the membrane in the next step; ``"immediate"``: in the same step;
            ``"corrected"``: snnTorch's ``reset_delay=False``, which resets what is still above threshold before
            the update and corrects by ``s - R`` after firing.
        scope: for delayed and corrected ``"zero"``: whether the reset zeroes the previous ``"state"``
            (snnTorch's Leaky) or the whole new ``"sum"`` (Synaptic, RLeaky, RSynaptic).
        attached: whether the immediate reset carries the surrogate's gradient. Delayed ones never do.
        spiking: False for a leaky-integrator readout: no threshold, the output is the membrane.

    Raises:
        ConfigError: a combination outside the family.

    Example:
        >>> NeuronSpec().reset
        'subtract'
    """

    update: Literal["decay", "euler", "box"] = "decay"
    synapse: bool = False
    reset: Literal["none", "subtract", "zero", "value"] = "subtract"
    timing: Literal["delayed", "immediate", "corrected"] = "delayed"
    scope: Literal["state", "sum"] = "state"
    attached: bool = False
    spiking: bool = True

    def __post_init__(self) -> None:
        for name, allowed in (
            ("update", UPDATES),
            ("reset", RESETS),
            ("timing", TIMINGS),
            ("scope", SCOPES),
        ):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"NeuronSpec.{name} must be one of {allowed}, got {getattr(self, name)!r}.")
        if self.update == "euler" and not self.synapse:
            raise ConfigError('update="euler" has a synapse; use "box" for Norse\'s current-free neuron.')
        if self.update == "box" and self.synapse:
            raise ConfigError('update="box" has no synapse; use "euler".')
        if self.attached and self.timing == "delayed":
            raise ConfigError("a delayed reset is detached in every upstream neuron.")
        if self.reset == "value" and self.timing != "immediate":
            raise ConfigError('reset="value" is immediate.')
        if self.timing == "corrected" and self.update != "decay":
            raise ConfigError('timing="corrected" belongs to update="decay".')
        if not self.spiking and self.reset != "none":
            raise ConfigError('a readout does not reset: use reset="none".')


# rows of the packed parameter tensor of the op, in this order
PARAM_NAMES = ("mem", "syn", "threshold", "leak", "reset_value")


class NeuronParams(NamedTuple):
    """Decays and thresholds; each a number, or a tensor that broadcasts to the neurons' shape (N...), learned or not.

    ``mem`` and ``syn`` are decay factors for ``update="decay"``, rates (dt / tau) otherwise. ``threshold``,
    ``leak`` and ``reset_value`` are in units of the membrane. They are taken in the dtype of the layer's input.

    Example:
        >>> NeuronParams(mem=0.9, threshold=1.5)
        NeuronParams(mem=0.9, syn=0.0, threshold=1.5, leak=0.0, reset_value=0.0)
    """

    mem: Tensor | float
    syn: Tensor | float = 0.0
    threshold: Tensor | float = 1.0
    leak: Tensor | float = 0.0
    reset_value: Tensor | float = 0.0


class NeuronState(NamedTuple):
    """State between steps, each (B, N...): membrane, synaptic current, and last spikes of a recurrent layer.

    ``None`` is zeros where a run begins, and where it ends a state that the neuron does not have.

    Example:
        >>> import torch
        >>> state = NeuronState(v=torch.zeros(4, 20))
        >>> state.i is None
        True
    """

    v: Tensor | None = None
    i: Tensor | None = None
    spikes: Tensor | None = None
