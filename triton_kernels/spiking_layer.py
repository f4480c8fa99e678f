"""Launcher of the ``spiking_layer`` kernels: allocate the outputs, choose the blocks, launch once.

A neuron given by equations has kernels of its own that take the same arguments; its states are all in ``v``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..core.backend import CHUNK, LayerCall, OutputGrads
from ..core.dynamics import NeuronSpec
from ..core.equations import Equations
from .backward import spiking_layer_backward
from .forward import spiking_layer_forward
from .program_constants import backward_constants, forward_constants
from .program_kernels import program_backward, program_forward

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
    near: Tensor | None  # (B, blocks) int64


class Backward(NamedTuple):
    """Gradients of the input current (T, B, N), the initial state and the parameters (5 or P, B, N)."""

    nu: Tensor
    v0: Tensor
    i0: Tensor | None
    params: Tensor | None


def _launch(call: LayerCall) -> dict[str, Any]:
    block = min(128, max(32, triton.next_power_of_2(call.N)))
    if call.rec_weight is not None:
        block = max(32, triton.next_power_of_2(call.N))
    return {
        "BLOCK_N": block,
        "CHUNK": CHUNK,
        "num_warps": min(16, block // 32),
        # upstream rounds after every product: a contracted multiply-add would move spikes
        "enable_fp_fusion": False,
    }


def _constants(spec: NeuronSpec) -> dict[str, Any]:
    return {
        "UPDATE": spec.update,
        "SYNAPSE": spec.synapse,
        "RESET": spec.reset,
        "TIMING": spec.timing,
        "SCOPE": spec.scope,
        "SPIKING": spec.spiking,
    }


def _forward_of(call: LayerCall) -> tuple[Any, dict[str, Any]]:
    if isinstance(call.spec, Equations):
        return program_forward, forward_constants(call.spec)
    return spiking_layer_forward, _constants(call.spec)


def _backward_of(call: LayerCall) -> tuple[Any, dict[str, Any]]:
    if isinstance(call.spec, Equations):
        return program_backward, backward_constants(call.spec, call.params_grad)
    return spiking_layer_backward, {**_constants(call.spec), "ATTACHED": call.spec.attached}


def _grid(call: LayerCall) -> tuple[int, int]:
    return call.B, triton.cdiv(call.N, _launch(call)["BLOCK_N"])


def _flat(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().contiguous()


def _input(call: LayerCall, current: Tensor | None) -> tuple[Tensor | None, bool]:
    """The current as the kernels read it, and whether one (B, N) slice serves every step."""
    if current is None:
        return None, False
    static = call.T > 1 and current.stride(0) == 0
    return (current[0] if static else current).detach().contiguous(), static


def _received(call: LayerCall, current: Tensor | None, in_words: Tensor | None) -> list[Any]:
    """What drives the layer, as both kernels take it: current or words, W^T and bias, W_rec^T."""
    gathers = in_words is not None and call.weight is not None
    return [
        current,
        in_words,
        _flat(call.weight.t()) if gathers else None,  # type: ignore[union-attr]
        _flat(call.bias) if gathers else None,
        None if call.rec_weight is None else _flat(call.rec_weight.t()),
    ]


def _sizes(call: LayerCall, in_words: Tensor | None) -> tuple[int, ...]:
    return call.T, call.B, call.N, 0 if in_words is None else in_words.shape[2], triton.cdiv(call.N, 32)


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
    state, synapse = like.shape, isinstance(call.spec, NeuronSpec) and call.spec.synapse
    chunks = triton.cdiv(T, CHUNK)
    x, static = _input(call, current)
    out = Forward(
        torch.empty(T, B, triton.cdiv(N, 32), dtype=torch.int32, device=like.device) if words else None,
        like.new_empty(T, B, N) if spikes else None,
        like.new_empty(T, B, N) if mem else None,
        like.new_empty(state),
        like.new_empty(B, N) if synapse else None,
        like.new_empty(chunks, *state) if checkpoints else None,
        like.new_empty(chunks, B, N) if checkpoints and synapse else None,
        None if window is None else torch.empty(_grid(call), dtype=torch.int64, device=like.device),
    )
    if B * N == 0:
        return out
    kernel, constants = _forward_of(call)
    with torch.cuda.device_of(like):
        kernel[_grid(call)](
            *_received(call, x, in_words),
            *(_flat(t) for t in (call.rec_bias, call.rec0, call.v0, call.i0, call.params)),
            *out,
            *_sizes(call, in_words),
            WINDOW=window,
            STATIC_INPUT=static,
            **constants,
            **_launch(call),
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
    synapse = isinstance(call.spec, NeuronSpec) and call.spec.synapse
    out = Backward(
        like.new_empty(T, B, call.currents),
        like.new_empty(like.shape),
        like.new_empty(B, N) if synapse else None,
        like.new_empty(len(call.params), B, N) if params else None,
    )
    if T * B * N == 0:
        for grad, given in ((out.v0, grads.v), (out.i0, grads.i)):
            if grad is not None:
                grad.zero_() if given is None else grad.copy_(given)
        if out.params is not None:
            out.params.zero_()
        return out
    kernel, constants = _backward_of(call)
    # of a chunk: the states before each step, and what its replay found
    planes = 2 + params
    if isinstance(call.spec, Equations):
        planes = len(like) + 2 * len(call.spec.program.inputs)
    launch = _launch(call)
    P0, P1 = call.surrogate.packed
    with torch.cuda.device_of(like):
        kernel[_grid(call)](
            *_received(call, x, in_words),
            *(_flat(t) for t in (call.rec_weight, call.rec_bias, call.rec0)),
            words,
            *checkpoints,
            _flat(call.params),
            *(_flat(g) for g in grads[1:]),
            like.new_empty(CHUNK, planes, B, N),
            *out,
            *_sizes(call, in_words),
            WINDOW=window,
            KIND=call.surrogate.kind,
            P0=P0,
            P1=P1,
            STATIC_INPUT=static,
            TILE=max(1, 4096 // launch["BLOCK_N"]),
            **constants,
            **launch,
        )
    return out
