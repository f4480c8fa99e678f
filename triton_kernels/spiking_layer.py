"""Launchers of a layer's kernels: allocate what leaves, choose the blocks, launch once.

A canonical neuron is run from the program that is traced from its step, like one that is given by equations.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..core.backend import CHUNK, LayerCall, OutputGrads, enough
from ..core.dynamics import NeuronSpec
from ..core.equations import Equations
from .scans import source_of
from .sources import module_of

MAX_RECURRENT = 16384  # neurons of a recurrent layer: one program holds them all in registers


class Forward(NamedTuple):
    """What the forward kernel wrote; None where it was not asked for."""

    words: Tensor | None  # (T, B, ceil(N / 32)) int32
    spikes: Tensor | None  # (T, B, N)
    mem: Tensor | None
    v: Tensor  # as the call's v0: (B, N) or (K, B, N)
    i: Tensor | None  # (B, N)
    v_checkpoints: Tensor | None  # (ceil(T / CHUNK), *v0.shape)
    i_checkpoints: Tensor | None
    near: Tensor | None  # 0-dim int64: neuron-steps within ``window`` of the threshold


class Backward(NamedTuple):
    """Gradients of the input current (T, B, C * N), or its sum over the steps (1, B, C * N), of the initial state and
    of the parameters (P, B, N)."""

    nu: Tensor
    v0: Tensor
    i0: Tensor | None
    params: Tensor | None


def _module(call: LayerCall, way: str, params_grad: bool = False) -> ModuleType:
    recurrent, size = call.rec_weight is not None, call.v0.element_size()
    return module_of(source_of(call.spec, recurrent, way, params_grad, size), way)


def _launch(call: LayerCall) -> dict[str, Any]:
    """A warp has 32 neurons of a sample: whatever N is, there are programs for every multiprocessor."""
    block = 32 if call.rec_weight is None else max(32, triton.next_power_of_2(call.N))
    # upstream rounds after every product: a contracted multiply-add would move spikes
    return {"BLOCK": block, "num_warps": min(16, block // 32), "enable_fp_fusion": False, "num_stages": 1}


def _grid(call: LayerCall) -> tuple[int, int]:
    return call.B, triton.cdiv(call.N, _launch(call)["BLOCK"])


def _steps(x: Tensor | None) -> tuple[Tensor | None, int]:
    """A tensor over (T, B, N) as kernels read it, and how far apart its steps are: 0 where one serves them all."""
    if x is None:
        return None, 0
    x = x.detach()
    if len(x) > 1 and x.stride(0) == 0:
        return x[0].contiguous(), 0
    x = x.contiguous()
    return x, x.stride(0)


def _flat(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().contiguous()


def _fed_back(call: LayerCall) -> list[Tensor | None]:
    """W_rec^T, whose row m is what spike m adds, the bias, and the current of the first step."""
    if call.rec_weight is None:
        return []
    return [_flat(call.rec_weight.t()), _flat(call.rec_bias), _flat(call.rec0)]


def _states(call: LayerCall, v: Tensor | None, i: Tensor | None, dim: int = 0) -> list[Tensor | None]:
    """One tensor a state, of a membrane (and synapse) or of all states of some equations, stacked along ``dim``."""
    if isinstance(call.spec, Equations):
        return [None] * len(call.spec.states) if v is None else list(v.unbind(dim))
    return [v, i] if call.spec.synapse else [v]


def _checkpoint_rows(call: LayerCall) -> int:
    return call.B * (len(call.spec.states) if isinstance(call.spec, Equations) else 1)


def forward(
    call: LayerCall,
    current: Tensor,
    *,
    words: bool,
    spikes: bool,
    mem: bool,
    checkpoints: bool,
    window: float | None,
) -> Forward:
    """Run the layer on ``current`` (T, B, C * N).

    ``words``, ``spikes``, ``mem`` and ``checkpoints`` say what to write; ``window`` counts the neuron-steps
    within that distance of the threshold.
    """
    T, B, N, like = call.T, call.B, call.N, call.v0.detach()
    synapse = isinstance(call.spec, NeuronSpec) and call.spec.synapse
    kept = (triton.cdiv(T, CHUNK), *like.shape)
    out = Forward(
        torch.empty(T, B, triton.cdiv(N, 32), dtype=torch.int32, device=like.device) if words else None,
        like.new_empty(T, B, N) if spikes else None,
        like.new_empty(T, B, N) if mem else None,
        torch.empty_like(like),
        torch.empty_like(like) if synapse else None,
        like.new_empty(kept) if checkpoints else None,
        like.new_empty(kept) if checkpoints and synapse else None,
        None if window is None else torch.zeros((), dtype=torch.int64, device=like.device),
    )
    if B * N == 0:
        return out
    x, stride = _steps(current)
    with torch.cuda.device_of(like):
        _module(call, "forward").forward[_grid(call)](
            *_states(call, like, call.i0),
            *_states(call, out.v, out.i),
            *_states(call, out.v_checkpoints, out.i_checkpoints, 1),
            *_fed_back(call),
            x,
            stride,
            _checkpoint_rows(call),
            _flat(call.params),
            out.words,
            out.spikes,
            out.mem,
            out.near,
            T,
            B,
            N,
            triton.cdiv(N, 32),
            WINDOW=window,
            **_launch(call),
        )
    return out


def backward(
    call: LayerCall,
    current: Tensor,
    words: Tensor | None,
    checkpoints: tuple[Tensor, Tensor | None],
    window: float | None,
    near: Tensor | None,
    grads: OutputGrads,
    *,
    params: bool,
    in_place: bool,
) -> Backward:
    """Run the adjoint of :func:`forward`. ``in_place``: nu takes the memory of the current.

    ``words`` are the layer's own spikes where it is recurrent. ``window`` is None for the exact surrogate; with
    ``near``, the count of the forward, it holds where that reaches ``call.min_active``.
    """
    T, B, N, like = call.T, call.B, call.N, call.v0.detach()
    synapse = isinstance(call.spec, NeuronSpec) and call.spec.synapse
    recurrent, once = call.rec_weight is not None, call.once and call.rec_weight is None
    out = Backward(
        # a thread reads its currents of a group of steps before it writes their gradients
        current if in_place else like.new_empty(1 if once else T, B, call.currents),
        torch.empty_like(like),
        torch.empty_like(like) if synapse else None,
        like.new_zeros(len(call.params), B, N) if params else None,
    )
    if T * B * N == 0:
        for grad, given in ((out.v0, grads.v), (out.i0, grads.i)):
            if grad is not None:
                grad.zero_() if given is None else grad.copy_(given)
        out.nu.zero_()
        return out
    launch, n_words = _launch(call), triton.cdiv(N, 32)
    own: list[Any] = []
    if recurrent:
        planes = (1 if synapse else 0) + 1 + call.currents // N
        if isinstance(call.spec, Equations):
            planes = len(call.spec.states) + len(call.spec.inputs)
        bits = torch.empty(B, n_words, dtype=torch.int32, device=like.device)
        own = [*_fed_back(call), _flat(call.rec_weight), words, like.new_empty(CHUNK, planes, B, N), bits]
    x, stride = _steps(current)
    g_spikes, g_stride = _steps(grads.spikes)
    g_mem, g_mem_stride = _steps(grads.mem)
    p0, p1 = call.surrogate.packed
    more = {"n_words": n_words, "TILE": max(1, 4096 // launch["BLOCK"])} if recurrent else {"ONCE": once}
    with torch.cuda.device_of(like):
        _module(call, "backward", params).backward[_grid(call)](
            *_states(call, *checkpoints, 1),
            *_states(call, _flat(grads.v), _flat(grads.i)),
            *_states(call, out.v0, out.i0),
            *own,
            x,
            stride,
            _checkpoint_rows(call),
            _flat(call.params),
            near,
            math.ceil(enough(call)),
            g_spikes,
            g_stride,
            g_mem,
            g_mem_stride,
            out.nu,
            out.params,
            T,
            B,
            N,
            WINDOW=window,
            KIND=call.surrogate.kind,
            P0=p0,
            P1=p1,
            **more,
            **launch,
        )
    return out
