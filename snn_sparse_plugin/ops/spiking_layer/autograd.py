"""Autograd of an eager call: keeps what is smallest, so the shapes of what it saves depend on the data."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from ...backends.product import ProductGrad
from ...core import tally
from ...core.backend import Backend, LayerCall, LayerResult, Needs, OutputGrads, Saved
from ...core.precision import without_autocast
from ...core.spikes import Active, SpikeTrain
from ...core.surrogates import once
from . import again

_LEAVES = ("current", "dense", "weight", "bias", "rec_weight", "rec_bias", "rec0", "v0", "i0", "params")
_leaves = attrgetter(*_LEAVES)
_NOTHING: dict[str, Any] = dict.fromkeys(("train", *_LEAVES))


def _saved(ctx: Any) -> tuple[Any, ...]:
    """What was kept for the backward, or torch's error, with a note of what it mostly means in a spiking network."""
    try:
        kept: tuple[Any, ...] = ctx.saved_tensors
    except RuntimeError as error:
        if "second time" in str(error) and hasattr(error, "add_note"):  # from Python 3.11 on
            error.add_note(
                f"{ctx.call.name}: the state of these neurons comes from steps whose backward has run, such as those "
                "of the batch before: begin with a new one (snntorch.utils.reset(net), mem = lif.init_leaky(), "
                "state = None), or cut it off (lif.detach_hidden(), mem.detach()). If the same loss is meant, pass "
                "retain_graph=True to its first backward."
            )
        raise
    return kept


def apply(call: LayerCall, backend: Backend) -> tuple[LayerResult, Tensor | None]:
    """Run the op differentiably: -> (result with graph-carrying tensors, carrier of the output events)."""
    carrier = call.train.carrier if call.train is not None else None
    leaves = _leaves(call)
    if call.current is not None and call.current.shape[0] != call.T:
        call = call.changed(current=_of_all_steps(call.current, call.T), once=True)
    if not call.needs_grad:
        return backend.spiking_layer(call), None
    box: list[LayerResult] = []
    carrier_out, spikes, mem, v, i = _SpikingLayer.apply(call, backend, box, carrier, *leaves)
    _, events, _, _, _, saved, fraction, words = box[0]
    return LayerResult(spikes, events, mem, v, i, saved, fraction, words), carrier_out


def _of_all_steps(current: Tensor | None, T: int) -> Tensor | None:
    """A current of one step (1, B, N) that comes at every step, as (T, B, N)."""
    return current if current is None or current.shape[0] == T else current.expand(T, -1, -1)


class _SpikingLayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, call: LayerCall, backend: Backend, box: list[LayerResult], *inputs: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        result = backend.spiking_layer(call)
        saved, events = result.saved, result.events
        assert saved is not None
        box.append(result)
        train = call.train
        ctx.backend, ctx.threshold, ctx.train_like = backend, saved.threshold, None
        ctx.adds_rows = saved.adds_rows
        ctx.ran = tally.current()
        if train is not None:
            ctx.train_like = (train.shape, train.dtype)
        kept = list(inputs[1:])
        if not saved.needs_current:
            kept[0] = None
        kept += [
            saved.u,
            saved.v_checkpoints,
            saved.i_checkpoints,
            saved.mem,
            saved.near,
            result.words,
            saved.rows,
        ]
        kept += list(saved.active or (None, None)) + list(events or (None, None))
        if train is not None:
            as_bits = backend.takes_dense and train.values is None
            kept += [train.words, None] if as_bits else [train.indptr, train.indices]
            kept += [train.values, *(train.active or (None, None))]
        else:
            kept += [None] * 5
        ctx.save_for_backward(*kept, inputs[0])
        ctx.call = call.changed(**_NOTHING)
        carrier = None
        if call.want_events:
            shape = (call.T, call.B, call.N) if saved.active is None else saved.active.indices.shape
            carrier = result.v.new_zeros(()).expand(shape)
        return carrier, result.spikes, result.mem, result.v, result.i

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.ran.count("backward")
        with without_autocast():
            return _SpikingLayer._backward(ctx, *grads)

    @staticmethod
    def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *kept, carrier = _saved(ctx)
        n = len(_LEAVES)
        leaves: dict[str, Any] = dict(zip(_LEAVES, kept[:n], strict=True))
        call = ctx.call.changed(**leaves)
        call.current = _of_all_steps(call.current, call.T)
        u, v_checkpoints, i_checkpoints, mem, near, words, call.rows = kept[n : n + 7]
        act_ptr, act_idx, ev_ptr, ev_idx = kept[n + 7 : n + 11]
        if ctx.train_like is not None:
            first, indices, values, in_ptr, in_idx = kept[n + 11 :]
            shape, dtype = ctx.train_like
            active = None if in_ptr is None else Active(in_ptr, in_idx)
            if indices is None:
                call.train = SpikeTrain.from_words(first, shape, dtype=dtype, active=active)
            else:
                call.train = SpikeTrain(
                    first, indices, shape, values, dtype=dtype, active=active, check=False
                )
        active = None if act_ptr is None else Active(act_ptr, act_idx)
        saved = Saved(
            *(ctx.threshold, active, u, v_checkpoints, i_checkpoints),
            mem=mem,
            near=near,
            words=words,
            adds_rows=ctx.adds_rows,
        )
        if torch.is_grad_enabled():  # create_graph=True
            return _differentiable(ctx, call, saved, {"carrier": carrier, **leaves}, grads)
        carrier_grad, g_spikes, g_mem, g_v, g_i = grads
        g_active = None
        if carrier_grad is not None:
            if active is not None:
                g_active = carrier_grad.contiguous()
            else:
                g_spikes = carrier_grad if g_spikes is None else g_spikes + carrier_grad
        if isinstance(g_spikes, ProductGrad) and not ctx.backend.takes_products:
            g_spikes = g_spikes.dense()
        of_events, of_current, of_dense, *others = ctx.needs_input_grad[3:]
        needs = Needs(of_events or of_current or of_dense, *others)
        events = None if ev_ptr is None else (ev_ptr, ev_idx)
        found = ctx.backend.spiking_layer_backward(
            call, saved, events, OutputGrads(g_active, g_spikes, g_mem, g_v, g_i), needs
        )
        grad_input, *rest = found
        if grad_input is not None and call.once and len(grad_input) > 1:
            grad_input = grad_input.sum(0, keepdim=True)
        place = 0 if ctx.train_like is not None else 1 if call.dense is None else 2
        of_inputs = [grad_input if k == place else None for k in range(3)]
        return (None, None, None, *of_inputs, *rest)


def _differentiable(
    ctx: Any, call: LayerCall, saved: Saved, leaves: dict[str, Any], grads: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """What backward returns, as a function of the op's inputs and of ``grads``."""
    inputs = call.train, leaves["current"], leaves["dense"]
    if all(x is None for x in inputs):  # it was not kept, as a window needs it nowhere
        with torch.no_grad():
            once_only = _SpikingLayer.backward(ctx, *grads)
        return tuple(None if g is None else once(g, f"the gradient of {call.name}") for g in once_only)
    dense = tuple(g.dense() if isinstance(g, ProductGrad) else g for g in grads)
    found = again.gradients(call, call.surrogate, saved, call.train, leaves, dense)
    wanted = zip(leaves, ctx.needs_input_grad[3:], strict=True)
    return (None, None, None, *(found.get(name) if need else None for name, need in wanted))
