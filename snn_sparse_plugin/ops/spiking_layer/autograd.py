"""Autograd of the op: an autograd.Function for eager calls, torch.library ops for compiled graphs.

Eager calls keep what is smallest, so the shapes of what they save depend on the data. Compiled graphs want static
shapes: there the forward keeps checkpoints only and the backward replays, with the same numbers.
"""

from __future__ import annotations

from dataclasses import astuple, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ... import registry
from ...backends import CHUNK, Backend, LayerCall, LayerResult, OutputGrads, Saved
from ...dynamics import NeuronSpec
from ...spikes import Active, SpikeTrain
from ...surrogates import Surrogate

_LEAVES = ("current", "weight", "bias", "rec_weight", "rec_bias", "rec0", "v0", "i0", "params")


def apply(call: LayerCall, backend: Backend) -> tuple[LayerResult, Tensor | None]:
    """Run the op differentiably: -> (result with graph-carrying tensors, carrier of the output events)."""
    carrier = call.train.carrier if call.train is not None else None
    leaves = [getattr(call, name) for name in _LEAVES]
    if not call.needs_grad:
        return backend.spiking_layer(call), None
    box: list[LayerResult] = []
    carrier_out, spikes, mem, v, i = _SpikingLayer.apply(call, backend, box, carrier, *leaves)
    result = box[0]._replace(spikes=spikes, mem=mem, v=v, i=i)
    return result, carrier_out


class _SpikingLayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, call: LayerCall, backend: Backend, box: list[LayerResult], *inputs: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        result = backend.spiking_layer(call)
        saved, events = result.saved, result.events
        assert saved is not None
        box.append(result._replace(spikes=None, mem=None, saved=saved))
        train = call.train
        ctx.backend, ctx.threshold, ctx.train_like = backend, saved.threshold, None
        if train is not None:
            ctx.train_like = (train.shape, train.dtype, train.requires_grad)
        kept: list[Tensor | None] = [getattr(call, name) for name in _LEAVES]
        kept += [saved.u, saved.v_checkpoints, saved.i_checkpoints]
        kept += list(saved.active or (None, None)) + list(events or (None, None))
        if train is not None:
            kept += [train.indptr, train.indices, train.values, *(train.active or (None, None))]
        ctx.save_for_backward(*kept)
        ctx.call = replace(call, train=None, **dict.fromkeys(_LEAVES))
        ctx.frozen = result.active_fraction
        carrier = None
        if call.want_events:
            shape = (call.T, call.B, call.N) if saved.active is None else saved.active.indices.shape
            carrier = result.v.new_zeros(()).expand(shape)
        return carrier, result.spikes, result.mem, result.v, result.i

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        kept = ctx.saved_tensors
        n = len(_LEAVES)
        call = replace(ctx.call, **dict(zip(_LEAVES, kept[:n], strict=True)))
        u, v_checkpoints, i_checkpoints, act_ptr, act_idx, ev_ptr, ev_idx = kept[n : n + 7]
        if ctx.train_like is not None:
            indptr, indices, values, in_ptr, in_idx = kept[n + 7 :]
            shape, dtype, _ = ctx.train_like
            active = None if in_ptr is None else Active(in_ptr, in_idx)
            call.train = SpikeTrain(indptr, indices, shape, values, dtype=dtype, active=active)
        active = None if act_ptr is None else Active(act_ptr, act_idx)
        saved = Saved(ctx.threshold, active, u, v_checkpoints, i_checkpoints)
        carrier_grad, g_spikes, g_mem, g_v, g_i = grads
        g_active = None
        if carrier_grad is not None:
            if active is not None:
                g_active = carrier_grad.contiguous()
            else:
                g_spikes = carrier_grad if g_spikes is None else g_spikes + carrier_grad
        needs = ctx.needs_input_grad[3:]  # carrier, current, weight, bias, ...
        needs = (needs[0] or needs[1], *needs[2:])
        events = None if ev_ptr is None else (ev_ptr, ev_idx)
        found = ctx.backend.spiking_layer_backward(
            call, saved, events, OutputGrads(g_active, g_spikes, g_mem, g_v, g_i), needs
        )
        grad_input, *rest = found
        from_train = ctx.train_like is not None
        return (
            None,
            None,
            None,
            grad_input if from_train else None,
            None if from_train else grad_input,
            *rest,
        )


# --- torch.library ops: static shapes, for torch.compile and export ---


def encode(spec: NeuronSpec) -> str:
    return ",".join(str(x) for x in astuple(spec))


def _decode(text: str) -> NeuronSpec:
    values: list[Any] = [{"True": True, "False": False}.get(x, x) for x in text.split(",")]
    return NeuronSpec(*values)


def _call(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rec_weight: Tensor | None,
    rec_bias: Tensor | None,
    rec0: Tensor | None,
    v0: Tensor,
    i0: Tensor | None,
    params: Tensor,
    options: str,
    surrogate_params: list[float],
    threshold: float,
    min_active: float,
) -> tuple[LayerCall, Backend]:
    backend, spec, kind = options.split("|")
    train, current = None, x
    if weight is not None:
        train = SpikeTrain.from_dense(x)
        if train.density > DENSE_ABOVE:
            train, current = None, F.linear(x, weight, bias)
    call = LayerCall(
        _decode(spec),
        Surrogate(kind, tuple(surrogate_params)),
        None if threshold < 0 else threshold,
        min_active,
        *(x.shape[0], x.shape[1], v0.shape[1]),
        train,
        None if train is not None else current.contiguous(),
        *((weight.contiguous(), bias) if train is not None and weight is not None else (None, None)),
        rec_weight,
        rec_bias,
        rec0,
        v0.contiguous(),
        None if i0 is None else i0.contiguous(),
        params.contiguous(),
        want_mem=True,
        params_grad=True,
        save_active=False,
    )
    return call, registry.load("backends", backend)


DENSE_ABOVE = 0.25  # input density above which a dense product beats adding rows; measured by `snn-sparse bench`


@torch.library.custom_op("snn_sparse_plugin::spiking_layer", mutates_args=())
def _op(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rec_weight: Tensor | None,
    rec_bias: Tensor | None,
    rec0: Tensor | None,
    v0: Tensor,
    i0: Tensor | None,
    params: Tensor,
    options: str,
    surrogate_params: list[float],
    threshold: float,
    min_active: float,
) -> list[Tensor]:
    """spikes, mem (T, B, N), v, i (B, N), checkpoints of v and i, and whether the call ran exact."""
    call, backend = _call(
        x, weight, bias, rec_weight, rec_bias, rec0, v0, i0, params, options, surrogate_params, threshold, min_active
    )
    out = backend.spiking_layer(call)
    saved = out.saved
    assert saved is not None and saved.v_checkpoints is not None
    empty = v0.new_empty(0)
    mem = out.mem if out.mem is not None else empty
    spikes = out.spikes if call.spec.spiking else mem.clone()
    assert spikes is not None
    i_checkpoints = saved.i_checkpoints if call.spec.synapse else None
    return [
        spikes,
        mem,
        out.v,
        empty if out.i is None else out.i,
        saved.v_checkpoints,
        empty.clone() if i_checkpoints is None else i_checkpoints,
        torch.tensor(saved.threshold is None),
    ]


@_op.register_fake
def _(x, weight, bias, rec_weight, rec_bias, rec0, v0, i0, params, options, *rest):  # type: ignore[no-untyped-def]
    T, (B, N) = x.shape[0], v0.shape
    chunks = (T + CHUNK - 1) // CHUNK
    i_shape, i_chunks = ((0,), (0,)) if i0 is None else ((B, N), (chunks, B, N))
    return [
        v0.new_empty(T, B, N),
        v0.new_empty(T, B, N),
        v0.new_empty(B, N),
        v0.new_empty(i_shape),
        v0.new_empty(chunks, B, N),
        v0.new_empty(i_chunks),
        torch.empty((), dtype=torch.bool),
    ]


_BACK_FIELDS = ("x", "weight", "bias", "rec_weight", "rec_bias", "rec0", "v0", "i0", "params")


@torch.library.custom_op("snn_sparse_plugin::spiking_layer_backward", mutates_args=())
def _op_backward(
    g_spikes: Tensor,
    g_mem: Tensor,
    g_v: Tensor,
    g_i: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rec_weight: Tensor | None,
    rec_bias: Tensor | None,
    rec0: Tensor | None,
    v0: Tensor,
    i0: Tensor | None,
    params: Tensor,
    v_checkpoints: Tensor,
    i_checkpoints: Tensor,
    exact: Tensor,
    options: str,
    surrogate_params: list[float],
    threshold: float,
    min_active: float,
) -> list[Tensor]:
    call, backend = _call(
        x, weight, bias, rec_weight, rec_bias, rec0, v0, i0, params, options, surrogate_params, threshold, min_active
    )
    window = None if bool(exact) else call.threshold
    saved = Saved(window, None, None, v_checkpoints, i_checkpoints if i0 is not None else None)
    if not call.spec.spiking:
        g_spikes, g_mem = torch.zeros_like(g_mem), g_mem + g_spikes
    grads = OutputGrads(None, g_spikes.contiguous(), g_mem.contiguous(), g_v.contiguous(), g_i)
    present = [x, weight, bias, rec_weight, rec_bias, rec0, v0, i0, params]
    needs = tuple(p is not None for p in present)
    found = list(backend.spiking_layer_backward(call, saved, None, grads, needs))
    if weight is not None and call.train is None:  # the product was dense: finish it here
        nu = found[0]
        assert nu is not None
        found[0] = nu @ weight
        found[1] = nu.flatten(0, 1).t() @ x.flatten(0, 1)
        found[2] = None if bias is None else nu.sum((0, 1))
    empty = x.new_empty(0)
    return [
        empty.clone() if g is None or p is None else g.contiguous() for g, p in zip(found, present, strict=True)
    ]


@_op_backward.register_fake
def _(g_spikes, g_mem, g_v, g_i, *rest):  # type: ignore[no-untyped-def]
    return [rest[0].new_empty(0) if p is None else torch.empty_like(p).contiguous() for p in rest[:9]]


def _setup_context(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    ctx.options = inputs[9:]
    ctx.save_for_backward(*inputs[:9], *output[4:])


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    *inputs, v_checkpoints, i_checkpoints, exact = ctx.saved_tensors
    x, v0, i0 = inputs[0], inputs[6], inputs[7]
    T, (B, N) = x.shape[0], v0.shape
    shapes = [(T, B, N), (T, B, N), (B, N)]
    filled = [v0.new_zeros(s) if g is None else g for g, s in zip(grads, shapes, strict=False)]
    g_i = None if i0 is None else (torch.zeros_like(v0) if grads[3] is None else grads[3])
    found = _op_backward(*filled, g_i, *inputs, v_checkpoints, i_checkpoints, exact, *ctx.options)
    needed = ctx.needs_input_grad
    result = [
        g if p is not None and need else None for g, p, need in zip(found, inputs, needed, strict=False)
    ]
    return (*result, None, None, None, None)


_op.register_autograd(_backward, setup_context=_setup_context)


def compiled(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rec: tuple[Tensor | None, Tensor | None, Tensor | None],
    state: tuple[Tensor, Tensor | None],
    params: Tensor,
    spec: NeuronSpec,
    surrogate: Surrogate,
    threshold: float | None,
    min_active: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The op as a node of a graph: -> spikes, mem, v, i."""
    options = f"{backend}|{encode(spec)}|{surrogate.kind}"
    window = -1.0 if threshold is None else threshold
    spikes, mem, v, i, *_ = _op(
        x, weight, bias, *rec, *state, params, options, list(surrogate.params), window, min_active
    )
    return spikes, mem, v, None if state[1] is None else i
