"""What kernels take, by name; with no sizes where something is absent. B samples, N neurons, C·N currents, T steps."""

from __future__ import annotations

from typing import Any, NamedTuple


class Fed(NamedTuple):
    """What comes to the neurons of a layer: a current, or events and the rows that they add; and the recurrence."""

    current: Any  # (T, B, C·N), or (1, B, C·N) where it is the same at every step
    indptr: Any  # (B * T + 1,)
    indices: Any
    values: Any  # of a graded train
    weight: Any  # (M, C·N padded to lanes): rows of W^T
    bias: Any  # (C·N,)
    rec_weight: Any  # (N, C·N padded): rows of W_rec^T
    rec_bias: Any
    rec0: Any  # (B, C·N)


class States(NamedTuple):
    """Of the neurons, changed in place, and where they are noted every ``CHUNK`` steps."""

    v: Any  # (B, N), of a program (K, B, N)
    i: Any
    v_checkpoints: Any  # (chunks, *v.shape)
    i_checkpoints: Any


class Written(NamedTuple):
    """What a forward leaves behind, with running counts of its range of samples."""

    spikes: Any  # (T, B, N)
    mem: Any
    out_ptr: Any  # (B * T + 1,)
    out_idx: Any
    act_ptr: Any
    act_idx: Any
    act_x: Any  # membrane - threshold
    counts: Any  # int64: events, active kept, active seen


class Derivative(NamedTuple):
    """Of the spike: half the width of the window, < 0 without one, the surrogate's code and its two parameters."""

    window: float
    surrogate: int
    first_param: float
    second_param: float


class Entries(NamedTuple):
    """A CSR pattern over rows ``b * T + t``."""

    indptr: Any
    indices: Any


class Recurrence(NamedTuple):
    """The last three of :class:`Fed`."""

    weight: Any
    bias: Any
    first: Any


class Incoming(NamedTuple):
    """What came in, of which entries of it want a gradient, and what spiked."""

    indptr: Any
    indices: Any
    values: Any
    weight: Any  # (M, C·N padded): rows of W^T
    in_ptr: Any
    in_idx: Any
    out_ptr: Any
    out_idx: Any


class Arriving(NamedTuple):
    """Gradients that arrive: of active entries, of spikes and of the membrane (T, B, N)."""

    active: Any
    spikes: Any
    mem: Any


class Outgoing(NamedTuple):
    """Gradients that leave; of weights the rows of W^T, of this range of samples."""

    weight: Any
    bias: Any  # (1, C·N padded)
    active: Any  # of the input's active entries
    nu: Any  # (T or 1, B, C·N)
    rec_weight: Any
    rec_bias: Any
    rec0: Any
