"""Launchers of a layer's kernels: allocate what leaves, choose the blocks, launch once.

A canonical neuron is run from the program that is traced from its step, like one that is given by equations.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..core.backend import CHUNK, LayerCall, OutputGrads, enough, keeps_active
from ..core.dynamics import NeuronSpec
from ..core.equations import Equations
from . import products
from .scans import source_of
from .sources import module_of

log = logging.getLogger("snn_sparse_plugin")

MAX_RECURRENT = 16384  # neurons of a recurrent layer: one program holds them all in registers
_READERS = 64  # programs that can take W_rec from the L2 cache of an H100 about as fast as it gives
_FED = 1 << 23  # recurrent currents that are made at a time


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
    """Gradients of the input current, of the initial state and of the parameters (P, B, N)."""

    nu: Tensor | None
    """(T, B, C * N), as pairs of bf16 numbers where ``odd`` is given; None where one current serves all steps."""
    odd: Tensor | None  # (1,) int32: 1 where a number of nu is not finite
    sums: Tensor | None
    """nu summed over the steps, (1, B, C * N); of a recurrent layer (2, B, C * N), with that over all but the first"""
    v0: Tensor
    i0: Tensor | None
    params: Tensor | None


@cache
def _kernel(
    spec: NeuronSpec | Equations, recurrent: bool, way: str, params_grad: bool, size: int, samples: int = 1
) -> Any:
    return getattr(module_of(source_of(spec, recurrent, way, params_grad, size, samples), way), way)


@cache
def _launch(recurrent: bool, N: int) -> tuple[int, dict[str, Any]]:
    """Programs of a sample, and options. A warp has 32 of its neurons: whatever N is, no multiprocessor waits."""
    block = max(32, triton.next_power_of_2(N)) if recurrent else 32
    # upstream rounds after every product: a contracted multiply-add would move spikes
    options = {"BLOCK": block, "num_warps": min(16, block // 32), "enable_fp_fusion": False, "num_stages": 1}
    return -(-N // block), options


def _steps(x: Tensor | None) -> tuple[Tensor | None, int]:
    """A tensor over (T, B, N) as kernels read it, and how far apart its steps are: 0 where one serves them all."""
    if x is None:
        return None, 0
    if len(x) > 1 and x.stride(0) == 0:
        return x[0].contiguous(), 0
    x = x.contiguous()
    return x, x.stride(0)


def _flat(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _fed_back(call: LayerCall) -> list[Tensor | None]:
    """W_rec^T, whose row m is what spike m adds, the bias, and the current of the first step."""
    if call.rec_weight is None:
        return []
    return [_flat(call.rec_weight.t()), _flat(call.rec_bias), _flat(call.rec0)]


def _states(spec: NeuronSpec | Equations, *tensors: Tensor | None, dim: int = 0) -> Sequence[Tensor | None]:
    """One tensor a state, of a membrane and a synapse or of all states of some equations, stacked along ``dim``."""
    v = tensors[0]
    if isinstance(spec, Equations):
        return [None] * len(spec.states) if v is None else v.unbind(dim)
    return tensors if spec.synapse else (v,)


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
    spec, T, B, N, like = call.spec, call.T, call.B, call.N, call.v0
    recurrent, synapse = call.rec_weight is not None, isinstance(spec, NeuronSpec) and spec.synapse
    leaves = like.dtype if call.out_dtype is None else call.out_dtype
    kept, n_words = (-(-T // CHUNK), *like.shape), -(-N // 32)
    out = Forward(
        torch.empty(T, B, n_words, dtype=torch.int32, device=like.device) if words else None,
        like.new_empty(T, B, N, dtype=leaves) if spikes else None,
        like.new_empty(T, B, N, dtype=leaves) if mem else None,
        torch.empty_like(like),
        torch.empty_like(like) if synapse else None,
        like.new_empty(kept) if checkpoints else None,
        like.new_empty(kept) if checkpoints and synapse else None,
        None if window is None else torch.zeros((), dtype=torch.int64, device=like.device),
    )
    if B * N == 0:
        return out
    x, stride = _steps(current)
    programs, options = _launch(recurrent, N)
    _kernel(spec, recurrent, "forward", False, like.element_size())[B, programs](
        *_states(spec, like, call.i0),
        *_states(spec, out.v, out.i),
        *_states(spec, out.v_checkpoints, out.i_checkpoints, dim=1),
        *_fed_back(call),
        *(x, stride, B * _planes(call), _flat(call.params)),
        *(out.words, out.spikes, out.mem, out.near),
        *(T, B, N, n_words),
        WINDOW=window,
        **options,
    )
    return out


def _planes(call: LayerCall) -> int:
    """Rows (B, N) of a checkpoint."""
    return len(call.spec.states) if isinstance(call.spec, Equations) else 1


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
    sums: bool,
    in_place: bool,
    pairs: bool = False,
) -> Backward:
    """Run the adjoint of :func:`forward`. ``in_place``: nu takes the memory of the current; ``pairs``: as bf16 numbers.

    ``words`` are the layer's own spikes where it is recurrent. ``window`` is None for the exact surrogate; with
    ``near``, the count of the forward, it holds where that reaches ``call.min_active``.
    """
    spec, T, B, N, like = call.spec, call.T, call.B, call.N, call.v0
    recurrent, synapse = call.rec_weight is not None, isinstance(spec, NeuronSpec) and spec.synapse
    nu: Tensor | None = None
    if recurrent or not call.once:
        # currents of a group of steps are read before their gradients are written; a recurrence reads those again, and
        # wants them in full
        dtype = like.dtype if recurrent else current.dtype
        nu = (
            current
            if in_place and current.dtype == dtype
            else like.new_empty(T, B, call.currents, dtype=dtype)
        )
    sums_of = like.new_zeros if recurrent else like.new_empty  # a recurrence adds to what is there
    out = Backward(
        nu,
        torch.zeros(1, dtype=torch.int32, device=like.device) if pairs else None,
        sums_of(1 + recurrent, B, call.currents) if sums or nu is None else None,
        torch.empty_like(like),
        torch.empty_like(like) if synapse else None,
        like.new_zeros(len(call.params), B, N) if params else None,
    )
    if T * B * N == 0:
        for grad, given in ((out.v0, grads.v), (out.i0, grads.i), (out.nu, None), (out.sums, None)):
            if grad is not None:
                grad.zero_() if given is None else grad.copy_(given)
        return out
    if recurrent:
        assert words is not None
        _recurrent_backward(call, current, words, checkpoints, window, near, grads, out)
        return out
    programs, options = _launch(False, N)
    _kernel(spec, False, "backward", params, like.element_size())[B, programs](
        *_states(spec, *checkpoints, dim=1),
        *_states(spec, _flat(grads.v), _flat(grads.i)),
        *_states(spec, out.v0, out.i0),
        *_of_layer(call, current, near, grads, out),
        *(T, B, N),
        **_surrogate(call, window),
        odd_ptr=out.odd,
        **options,
    )
    return out


def _of_layer(
    call: LayerCall, current: Tensor, near: Tensor | None, grads: OutputGrads, out: Backward
) -> list[Any]:
    """Arguments that both backward kernels have."""
    return [
        *_steps(current),
        *(call.B * _planes(call), _flat(call.params)),
        *(near, math.ceil(enough(call))),
        *_steps(grads.spikes),
        *_steps(grads.mem),
        *(out.nu, out.sums, out.params),
    ]


def _surrogate(call: LayerCall, window: float | None) -> dict[str, Any]:
    p0, p1 = call.surrogate.packed
    return {"WINDOW": window, "KIND": call.surrogate.kind, "P0": p0, "P1": p1}


@cache
def _tile(B: int, N: int, held: int, alone: bool) -> tuple[int, dict[str, Any]]:
    """Samples of a program of the recurrent backward, and options; a neuron's states are ``held`` 4-byte registers.

    ``alone``: the gradient is masked, and a program has one sample. Of an exact one every program reads all of W_rec at
    every step, N = 512 a megabyte. An H100's multiprocessor takes some 0.1 TB/s and its L2 cache gives 5.5, so that
    beyond 64 programs samples share them. By arithmetic; not measured.
    """
    block = max(32, triton.next_power_of_2(N))
    samples = 1
    # 2048: with 16 warps, 4 neuron-samples a thread, whose states of 12 steps take 48 of its 128 registers
    while not alone and samples < 8 and _READERS * samples < B and 2 * samples * block * held <= 2048:
        samples *= 2
    warps = min(16, max(4, samples * block // 32))
    words = min(triton.next_power_of_2(-(-N // 32)), max(1, 8192 // block))
    tile = max(1, 128 * warps // block)  # rows of W_rec of which each thread has 16 bytes
    options = {"BLOCK": block, "TILE": tile, "WORDS": words, "num_warps": warps}
    log.debug("recurrent backward of %d neurons, %d samples: %d to a program", N, B, samples)
    return samples, options | {"enable_fp_fusion": False, "num_stages": 1}


def _recurrent_backward(
    call: LayerCall,
    current: Tensor,
    words: Tensor,
    checkpoints: tuple[Tensor, Tensor | None],
    window: float | None,
    near: Tensor | None,
    grads: OutputGrads,
    out: Backward,
) -> None:
    """Walk back a part of the steps at a time, with the recurrent currents of that part."""
    spec, T, B, N, like = call.spec, call.T, call.B, call.N, call.v0
    for grad, given in ((out.v0, grads.v), (out.i0, grads.i)):  # goes from one part to the part before
        if grad is not None:
            grad.zero_() if given is None else grad.copy_(given)
    assert call.rec_weight is not None
    assert call.rec0 is not None
    states = _states(spec, out.v0, out.i0)
    masked = window is not None and keeps_active(call)
    samples, options = _tile(B, N, len(states) * like.element_size() // 4, masked)
    weight, table, bias = call.rec_weight.contiguous(), call.rec_weight.t().contiguous(), _flat(call.rec_bias)
    bits = torch.empty(2, B, words.shape[2], dtype=torch.int32, device=like.device) if masked else None
    kernel = _kernel(spec, True, "backward", out.params is not None, like.element_size(), samples)
    layer = _of_layer(call, current, near, grads, out)
    share = max(1, _FED // (B * call.currents * CHUNK)) * CHUNK
    fed = like.new_empty(min(T, share), B, call.currents)
    for begin in reversed(range(0, T, share)):
        end = min(T, begin + share)
        known = int(begin == 0)  # the first step's were given
        if known:
            fed[0] = call.rec0
        products.add_rows(words[begin + known - 1 : end - 1], table, bias, fed[known : end - begin])
        kernel[-(-B // samples), 1](
            *_states(spec, *checkpoints, dim=1),
            *states,
            *(fed, weight, table, bits),
            *layer,
            *(begin, end, T, B, N, words.shape[2]),
            **_surrogate(call, window),
            **options,
        )
