"""Launchers of the ``spiking_layer`` kernels: allocate the outputs, choose the blocks, launch once."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..backends import CHUNK, LayerCall, OutputGrads
from .backward import spiking_layer_backward
from .forward import spiking_layer_forward

MAX_RECURRENT = 16384  # neurons of a recurrent layer: one program holds them all in registers


class Forward(NamedTuple):
    """What the forward kernel wrote; None where it was not asked for."""

    words: Tensor | None  # (T, B, ceil(N / 32)) int32
    spikes: Tensor | None  # (T, B, N)
    mem: Tensor | None
    v: Tensor  # (B, N)
    i: Tensor | None
    v_checkpoints: Tensor | None  # (ceil(T / CHUNK), B, N)
    i_checkpoints: Tensor | None
    near: Tensor | None  # (B, blocks) int64


class Backward(NamedTuple):
    """Gradients of the input current (T, B, N), the initial state (B, N) and the parameters (5, B, N)."""

    nu: Tensor
    v0: Tensor
    i0: Tensor | None
    params: Tensor | None


def _blocks(call: LayerCall) -> dict[str, int]:
    block = min(128, max(32, triton.next_power_of_2(call.N)))
    if call.rec_weight is not None:
        block = max(32, triton.next_power_of_2(call.N))
    return {"BLOCK_N": block, "num_warps": min(16, block // 32)}


def _options(call: LayerCall) -> dict[str, object]:
    spec = call.spec
    return {
        "UPDATE": spec.update,
        "SYNAPSE": spec.synapse,
        "RESET": spec.reset,
        "TIMING": spec.timing,
        "SCOPE": spec.scope,
        "SPIKING": spec.spiking,
        "CHUNK": CHUNK,
        # upstream rounds after every product: a contracted multiply-add would move spikes
        "enable_fp_fusion": False,
        **_blocks(call),
    }


def _grid(call: LayerCall) -> tuple[int, int]:
    return call.B, triton.cdiv(call.N, _blocks(call)["BLOCK_N"])


def _flat(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().contiguous()


def _synapses(call: LayerCall, from_words: bool) -> tuple[Tensor | None, Tensor | None]:
    """W^T and the bias for the kernels that gather; None where the current is given."""
    if not from_words:
        return None, None
    assert call.weight is not None
    return _flat(call.weight.t()), _flat(call.bias)


def _input(call: LayerCall, current: Tensor | None) -> tuple[Tensor | None, bool]:
    """The current as the kernels read it, and whether one (B, N) slice serves every step."""
    if current is None:
        return None, False
    static = call.T > 1 and current.stride(0) == 0
    return (current[0] if static else current).detach().contiguous(), static


def forward(
    call: LayerCall,
    current: Tensor | None,
    in_words: Tensor | None,
    *,
    words: bool,
    spikes: bool,
    mem: bool,
    checkpoints: bool,
    window: float | None,
) -> Forward:
    """Run the layer on ``current`` (T, B, N), or on ``in_words`` (T, B, ceil(M / 32)) and the call's weight.

    ``words``, ``spikes``, ``mem`` and ``checkpoints`` say what to write; ``window`` counts the neuron-steps
    within that distance of the threshold.
    """
    T, B, N, like = call.T, call.B, call.N, call.v0.detach()
    n_words, synapse = triton.cdiv(N, 32), call.spec.synapse
    chunks = triton.cdiv(T, CHUNK)
    x, static = _input(call, current)
    out = Forward(
        torch.empty(T, B, n_words, dtype=torch.int32, device=like.device) if words else None,
        like.new_empty(T, B, N) if spikes else None,
        like.new_empty(T, B, N) if mem else None,
        like.new_empty(B, N),
        like.new_empty(B, N) if synapse else None,
        like.new_empty(chunks, B, N) if checkpoints else None,
        like.new_empty(chunks, B, N) if checkpoints and synapse else None,
        None if window is None else torch.empty(_grid(call), dtype=torch.int64, device=like.device),
    )
    if B * N == 0:
        return out
    with torch.cuda.device_of(like):
        spiking_layer_forward[_grid(call)](
            x,
            in_words,
            *_synapses(call, in_words is not None),
            None if call.rec_weight is None else _flat(call.rec_weight.t()),
            _flat(call.rec_bias),
            _flat(call.rec0),
            _flat(call.v0),
            _flat(call.i0),
            _flat(call.params),
            *out,
            T,
            B,
            N,
            0 if in_words is None else in_words.shape[2],
            n_words,
            WINDOW=window,
            STATIC_INPUT=static,
            **_options(call),
        )
    return out


def backward(
    call: LayerCall,
    current: Tensor | None,
    in_words: Tensor | None,
    words: Tensor | None,
    checkpoints: tuple[Tensor, Tensor | None],
    window: float | None,
    grads: OutputGrads,
    *,
    params: bool,
) -> Backward:
    """Run the adjoint of :func:`forward`.

    ``words`` are the layer's own spikes where it is recurrent; ``window`` is None for the exact surrogate.
    """
    T, B, N, like = call.T, call.B, call.N, call.v0.detach()
    x, static = _input(call, current)
    scratch = like.new_empty(3 if params else 2, CHUNK, B, N)
    out = Backward(
        like.new_empty(T, B, N),
        like.new_empty(B, N),
        like.new_empty(B, N) if call.spec.synapse else None,
        like.new_empty(5, B, N) if params else None,
    )
    if B * N == 0:
        return out
    options = _options(call)
    P0, P1 = call.surrogate.packed
    with torch.cuda.device_of(like):
        spiking_layer_backward[_grid(call)](
            x,
            in_words,
            *_synapses(call, in_words is not None),
            None if call.rec_weight is None else _flat(call.rec_weight.t()),
            _flat(call.rec_weight),
            _flat(call.rec_bias),
            _flat(call.rec0),
            words,
            *checkpoints,
            _flat(call.params),
            *(_flat(g) for g in grads[1:]),
            scratch[0],
            scratch[1],
            scratch[2] if params else None,
            *out,
            T,
            B,
            N,
            0 if in_words is None else in_words.shape[2],
            triton.cdiv(N, 32),
            WINDOW=window,
            KIND=call.surrogate.kind,
            P0=P0,
            P1=P1,
            STATIC_INPUT=static,
            ATTACHED=call.spec.attached,
            TILE=max(1, 4096 // options["BLOCK_N"]),  # type: ignore[operator]
            **options,
        )
    return out
