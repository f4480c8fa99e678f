"""Launchers of the kernels for neurons given by equations, as those of ``spiking_layer.py``."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from ..backends import CHUNK, LayerCall, OutputGrads
from ..equations import Equations
from ..programs import Program
from .program_kernels import program_backward, program_forward
from .spiking_layer import Backward, Forward, _blocks, _flat, _grid, _input, _synapses


@cache
def encoded(program: Program, params_grad: bool) -> tuple[tuple, tuple]:
    """The program for ``execute`` and, register by register from the last, its uses for ``execute_back``."""
    uses: dict[int, list[tuple]] = {}
    last = program.registers - 1
    for (kind, out, a, b), flags in zip(program.ops, program.passes(params_grad), strict=True):
        for second, (register, wanted) in enumerate(zip((a, b), flags, strict=True)):
            if wanted:
                uses.setdefault(register, []).append((kind, bool(second), last - out, a, b, out))
    backward = tuple(
        (
            tuple(k for k, result in enumerate(program.results) if result == register),
            register == program.spikes,
            tuple(uses.get(register, ())),
        )
        for register in range(last, -1, -1)
    )
    return tuple((kind, a, b) for kind, _, a, b in program.ops), backward


def _options(call: LayerCall) -> tuple[Program, dict[str, Any]]:
    assert isinstance(call.spec, Equations)
    program = call.spec.program
    return program, {
        "PROGRAM": encoded(program, call.params_grad)[0],
        "CONSTANTS": program.constants,
        "RESULTS": program.results,
        "STATES": len(program.states),
        "INPUTS": len(program.inputs),
        "PARAMS": len(program.params),
        "MEMBRANE": program.states.index(call.spec.membrane),
        "CHUNK": CHUNK,
        "enable_fp_fusion": False,
        **_blocks(call),
    }


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
    """See ``spiking_layer.forward``; ``v`` and its checkpoints hold all K states."""
    T, B, N, like = call.T, call.B, call.N, call.v0.detach()
    K, n_words = len(like), triton.cdiv(N, 32)
    x, static = _input(call, current)
    out = Forward(
        torch.empty(T, B, n_words, dtype=torch.int32, device=like.device) if words else None,
        like.new_empty(T, B, N) if spikes else None,
        like.new_empty(T, B, N) if mem else None,
        like.new_empty(K, B, N),
        None,
        like.new_empty(triton.cdiv(T, CHUNK), K, B, N) if checkpoints else None,
        None,
        None if window is None else torch.empty(_grid(call), dtype=torch.int64, device=like.device),
    )
    if B * N == 0:
        return out
    program, options = _options(call)
    with torch.cuda.device_of(like):
        program_forward[_grid(call)](
            x,
            in_words,
            *_synapses(call, in_words is not None),
            None if call.rec_weight is None else _flat(call.rec_weight.t()),
            _flat(call.rec_bias),
            _flat(call.rec0),
            _flat(call.v0),
            _flat(call.params),
            out.words,
            out.spikes,
            out.mem,
            out.v,
            out.v_checkpoints,
            out.near,
            T,
            B,
            N,
            0 if in_words is None else in_words.shape[2],
            n_words,
            WINDOW=window,
            STATIC_INPUT=static,
            SPIKES=program.spikes,
            SITE=program.site,
            **options,
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
    """See ``spiking_layer.backward``."""
    T, B, N, like = call.T, call.B, call.N, call.v0.detach()
    K = len(like)
    x, static = _input(call, current)
    program, options = _options(call)
    last, first_param = program.registers - 1, program.first_param
    out = Backward(
        like.new_empty(T, B, call.currents),
        like.new_empty(K, B, N),
        None,
        like.new_empty(len(program.params), B, N) if params else None,
    )
    if B * N == 0 or T == 0:
        if grads.v is not None:
            out.v0.copy_(grads.v)
        else:
            out.v0.zero_()
        if out.params is not None:
            out.params.zero_()
        return out
    P0, P1 = call.surrogate.packed
    with torch.cuda.device_of(like):
        program_backward[_grid(call)](
            x,
            in_words,
            *_synapses(call, in_words is not None),
            None if call.rec_weight is None else _flat(call.rec_weight.t()),
            _flat(call.rec_weight),
            _flat(call.rec_bias),
            _flat(call.rec0),
            words,
            checkpoints[0],
            _flat(call.params),
            _flat(grads.spikes),
            _flat(grads.mem),
            _flat(grads.v),
            like.new_empty(CHUNK, K + 2 * len(program.inputs), B, N),
            out.nu,
            out.v0,
            out.params,
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
            BACKWARD=encoded(program, call.params_grad)[1],
            FROM_STATES=tuple(last - k for k in range(K)),
            FROM_INPUTS=tuple(last - k for k in range(K, program.first_recurrent)),
            FROM_PARAMS=tuple(last - first_param - k for k in range(len(program.params))),
            SPIKING=program.spikes is not None,
            TILE=max(1, 4096 // options["BLOCK_N"]),
            **options,
        )
    return out
