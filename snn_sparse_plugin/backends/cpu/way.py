"""Which backward runs: over the active list where that says all, else by a replay."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...core.backend import LayerCall, Needs, OutputGrads, Saved
from ...core.csr import Active
from ...core.dynamics import NeuronSpec
from ...core.equations import Equations
from ...core.once import made_once
from .linear import is_linear
from .memory import array
from .rows import MEM
from .spiking_layer import code_of, has_linear_replay, needs_states


class Way(NamedTuple):
    """Which kernel runs, and what the gradient of the input looks like."""

    by_list: bool  # over the active list; else the states are replayed
    impulses: bool  # the kernel over the list is that of impulses.py
    linear: bool  # the kernel that replays is that of replay_linear.py
    nu: bool  # the input wants a gradient at every neuron-step, not at its active entries alone


def only_decays(
    call: LayerCall,
    saved: Saved,
    events: tuple[Tensor, Tensor] | None,
    grads: OutputGrads,
    needs: Needs,
) -> bool:
    """Whether a replay can be spared because no gradient passes a surrogate, as in many readouts, whose loss sees the
    membrane alone, and spikes that reset are known where they matter."""
    spec = call.spec
    if saved.u is not None or isinstance(spec, Equations) or needs_states(spec) or wants_params(call, needs):
        return False
    silent = grads.active is None and grads.spikes is None and call.rec_weight is None and not spec.attached
    return silent and (spec.reset in ("none", "subtract") or events is not None)


def empty_list(call: LayerCall) -> Saved:
    """What a forward would have kept in which no neuron was ever active."""
    return _empty_list(call.B * call.T, call.v0.dtype)


@made_once(16)
def _empty_list(rows: int, dtype: torch.dtype) -> Saved:
    indptr = torch.zeros(rows + 1, dtype=torch.int32)
    indices, u = torch.empty(0, dtype=torch.int32), torch.empty(0, dtype=dtype)
    return Saved(None, Active(indptr, indices), u)


def way_of(call: LayerCall, saved: Saved, grads: OutputGrads, needs: Needs) -> Way:
    params = wants_params(call, needs)
    by_list = saved.u is not None and not params and not needs_states(call.spec)
    nu = needs.input and not input_is_listed(call)
    impulses = (
        by_list and not nu and grads.mem is None and _are_impulses(call) and _adds_less(call, saved, needs)
    )
    linear = not (by_list or params) and has_linear_replay(call)
    return Way(by_list, impulses, linear, nu)


def wants_params(call: LayerCall, needs: Needs) -> bool:
    return needs.params and call.params_grad


def input_is_listed(call: LayerCall) -> bool:
    """Whether the gradient of the input is one number for each active entry of it."""
    return call.train is not None and call.train.active is not None


def _are_impulses(call: LayerCall) -> bool:
    """Whether the backward over a list may be that of ``impulses.py``."""
    if (
        not (isinstance(call.spec, NeuronSpec) and is_linear(code_of(call)))
        or call.spec.synapse
        or not call.N
    ):
        return False
    if hasattr(call.params, "_snn_uniform"):  # each parameter is one number
        return True
    decays = array(call.params)[MEM]
    return bool((decays == decays[0]).all())


ADDED, SWEPT = 1.75, 10.0
"""Times of a row of W that is added, and of one that is swept, in those of :func:`_adds_less`: as measured with rows of
200 and 1000, and 1 to 35 events a step."""


def _adds_less(call: LayerCall, saved: Saved, needs: Needs) -> bool:
    """Whether impulses, which add a row of W for each active entry, take less time than what is done otherwise: to
    multiply one for each active entry of the input, and to sweep a row for each step. An event costs them more, as each
    adds to the gradient of W by itself: that is the unit."""
    if call.train is None:
        return True
    assert saved.active is not None
    assert call.weight is not None
    n, m = call.weight.shape
    events = call.train.indices.numel() * n if needs.weight else 0
    swept, added, multiplied = call.B * call.T * n, 0, 0
    if needs.input and call.train.active is not None:
        added, multiplied = saved.active.indices.numel() * m, call.train.active.indices.numel() * n
    return events + ADDED * added <= multiplied + SWEPT * swept
