"""The op in torch.library, for torch.compile and export: dense tensors in and out, static shapes.

The forward keeps checkpoints only and the backward replays, with the same numbers as an eager call. Everything that
depends on the context (config, choice of backend) happens when the op runs, so a compiled graph obeys the
``sparse_mode`` it is called in.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...backends import select
from ...core import bits
from ...core.backend import CHUNK, Backend, LayerCall, Needs, OutputGrads, Saved
from ...core.config import SparseConfig, current_config
from ...core.dynamics import NeuronSpec
from ...core.spikes import SpikeTrain
from ...core.surrogates import Surrogate
from .products import how_to_multiply

NAME_BYTES = 64  # the backend's name travels from forward to backward as a tensor of this size
UNSET, EXACT, AUTO = math.nan, -1.0, -2.0  # what the float option ``threshold`` says beside a window


def encode_spec(spec: NeuronSpec) -> str:
    flags = f"{spec.synapse},{spec.attached},{spec.spiking}"
    return f"{spec.update},{spec.reset},{spec.timing},{spec.scope},{flags}"


def _decode_spec(text: str) -> NeuronSpec:
    update, reset, timing, scope, *flags = text.split(",")
    synapse, attached, spiking = (flag == "True" for flag in flags)
    return NeuronSpec(update, synapse, reset, timing, scope, attached, spiking)  # type: ignore[arg-type]


def _prepare(
    inputs: tuple[Tensor | None, ...],
    spec: str,
    surrogate: str,
    numbers: list[float],
    backend: str,
    decided: str | None = None,
) -> tuple[LayerCall, Backend]:
    """The call and its backend. In backward ``decided`` names the one that ran forward: no context is looked at."""
    x, weight, bias, rec_weight, rec_bias, rec0, v0, i0, params = inputs
    assert x is not None
    assert v0 is not None
    assert params is not None
    threshold, min_active, *surrogate_params = numbers
    overrides: dict[str, Any] = {}
    if not math.isnan(threshold):
        overrides["backprop_threshold"] = {EXACT: None, AUTO: "auto"}.get(threshold, threshold)
    if not math.isnan(min_active):
        overrides["min_active"] = min_active
    if backend:
        overrides["backend"] = backend
    config = current_config().updated(**overrides) if decided is None else SparseConfig(backend=decided)
    the_spec, the_surrogate = _decode_spec(spec), Surrogate(surrogate, tuple(surrogate_params))
    chosen = select(
        config.backend,
        "spiking_layer",
        device=x.device,
        dtype=x.dtype,
        spec=the_spec,
        surrogate=the_surrogate,
        recurrent=rec_weight is not None,
    )
    train: SpikeTrain | None = None
    dense: Tensor | None = None
    current: Tensor | None = x
    if weight is not None:
        train, dense, current = how_to_multiply(x.detach(), weight, bias, chosen.takes_dense)
    call = LayerCall(
        spec=the_spec,
        surrogate=the_surrogate,
        threshold=the_surrogate.resolve(config.backprop_threshold),
        min_active=config.min_active,
        T=x.shape[0],
        B=x.shape[1],
        N=v0.shape[1],
        train=train,
        dense=dense,
        current=None if current is None else current.contiguous(),
        weight=weight if current is None else None,
        bias=bias if current is None else None,
        rec_weight=rec_weight,
        rec_bias=rec_bias,
        rec0=rec0,
        v0=v0.contiguous(),
        i0=None if i0 is None else i0.contiguous(),
        params=params.contiguous(),
        want_mem=True,
        want_events=rec_weight is not None,
        params_grad=True,
        save_active=False,
    )
    return call, chosen


def _name_tensor(name: str) -> Tensor:
    return torch.tensor(list(name.encode()[:NAME_BYTES].ljust(NAME_BYTES, b"\0")), dtype=torch.uint8)


@torch.library.custom_op("snn_sparse_plugin::spiking_layer", mutates_args=())
def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rec_weight: Tensor | None,
    rec_bias: Tensor | None,
    rec0: Tensor | None,
    v0: Tensor,
    i0: Tensor | None,
    params: Tensor,
    spec: str,
    surrogate: str,
    numbers: list[float],
    backend: str,
) -> list[Tensor]:
    """spikes, mem (T, B, N), v, i (B, N), checkpoints of v and i, and for the backward: window, near, backend.

    ``window`` is on the CPU: the window (-1: exact), min_active, 1 where ``near``, on the device, is to reach
    it, and 1 where a dense input was multiplied by adding rows.
    """
    inputs = (x, weight, bias, rec_weight, rec_bias, rec0, v0, i0, params)
    call, chosen = _prepare(inputs, spec, surrogate, numbers, backend)
    out = chosen.spiking_layer(call)
    saved, empty = out.saved, v0.new_empty(0)
    assert saved is not None
    assert saved.v_checkpoints is not None
    assert out.mem is not None
    return [
        out.mem.clone() if out.spikes is None else out.spikes,
        out.mem,
        out.v,
        empty if out.i is None else out.i,
        saved.v_checkpoints,
        saved.i_checkpoints if call.i0 is not None and saved.i_checkpoints is not None else empty.clone(),
        torch.tensor(
            [
                EXACT if saved.threshold is None else saved.threshold,
                call.min_active,
                saved.near is not None,
                bool(saved.adds_rows),
            ],
            dtype=torch.float64,
        ),
        v0.new_zeros((), dtype=torch.int64) if saved.near is None else saved.near,
        _name_tensor(chosen.name),
    ]


@_forward.register_fake
def _(x, weight, bias, rec_weight, rec_bias, rec0, v0, i0, *_):  # type: ignore[no-untyped-def]
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
        torch.empty(4, dtype=torch.float64),
        v0.new_empty((), dtype=torch.int64),
        torch.empty(NAME_BYTES, dtype=torch.uint8),
    ]


@torch.library.custom_op("snn_sparse_plugin::spiking_layer_backward", mutates_args=())
def _backward(
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
    spikes: Tensor | None,
    v_checkpoints: Tensor,
    i_checkpoints: Tensor,
    window: Tensor,
    near: Tensor,
    name: Tensor,
    spec: str,
    surrogate: str,
    numbers: list[float],
    backend: str,
) -> list[Tensor]:
    """Gradients of the nine tensor inputs; an empty tensor for an absent one."""
    inputs = (x, weight, bias, rec_weight, rec_bias, rec0, v0, i0, params)
    decided = bytes(name.tolist()).rstrip(b"\0").decode()
    call, chosen = _prepare(inputs, spec, surrogate, numbers, backend, decided)
    used, call.min_active, undecided, adds_rows = window.tolist()
    saved = Saved(
        None if used == EXACT else used,
        v_checkpoints=v_checkpoints,
        i_checkpoints=i_checkpoints if i0 is not None else None,
        near=near if undecided else None,
        adds_rows=bool(adds_rows),
    )
    events = None
    if spikes is not None and chosen.takes_dense:  # a recurrent layer replays from its own spikes
        saved = saved._replace(words=bits.pack(spikes))
    elif spikes is not None:
        train = SpikeTrain.from_dense(spikes)
        events = (train.indptr, train.indices)
    if not call.spec.spiking:
        g_spikes, g_mem = torch.zeros_like(g_mem), g_mem + g_spikes
    grads = OutputGrads(
        None,
        g_spikes.contiguous(),
        g_mem.contiguous(),
        g_v.contiguous(),
        None if g_i is None else g_i.contiguous(),
    )
    found = list(
        chosen.spiking_layer_backward(call, saved, events, grads, Needs(*(p is not None for p in inputs)))
    )
    if weight is not None and call.current is not None:  # the product was dense: finish it here
        nu = found[0]
        assert nu is not None
        found[0] = nu @ weight
        found[1] = nu.flatten(0, 1).t() @ x.flatten(0, 1)
        found[2] = None if bias is None else nu.sum((0, 1))
    return [
        x.new_empty(0) if g is None or p is None else g.contiguous()
        for g, p in zip(found, inputs, strict=True)
    ]


@_backward.register_fake
def _(g_spikes, g_mem, g_v, g_i, *rest):  # type: ignore[no-untyped-def]
    return [rest[0].new_empty(0 if p is None else p.shape) for p in rest[:9]]


def _setup_context(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    ctx.options = inputs[9:]
    recurrent = inputs[3] is not None
    ctx.save_for_backward(*inputs[:9], output[0] if recurrent else None, *output[4:])


def _autograd(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    inputs, rest = ctx.saved_tensors[:9], ctx.saved_tensors[9:]
    x, v0, i0 = inputs[0], inputs[6], inputs[7]
    T, (B, N) = x.shape[0], v0.shape
    shapes = [(T, B, N), (T, B, N), (B, N)]
    filled = [v0.new_zeros(s) if g is None else g for g, s in zip(grads, shapes, strict=False)]
    g_i = None if i0 is None else (torch.zeros_like(v0) if grads[3] is None else grads[3])
    found = _backward(*filled, g_i, *inputs, *rest, *ctx.options)
    wanted = [
        g if p is not None and need else None
        for g, p, need in zip(found, inputs, ctx.needs_input_grad, strict=False)
    ]
    return (*wanted, None, None, None, None)


_forward.register_autograd(_autograd, setup_context=_setup_context)


def spiking_layer_op(
    inputs: tuple[Tensor | None, ...], spec: NeuronSpec, surrogate: Surrogate, overrides: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The op as a node of a graph: -> spikes, mem, v, i. ``inputs`` in the order of the op's schema."""
    threshold = overrides.get("backprop_threshold", UNSET)
    threshold = EXACT if threshold is None else AUTO if threshold == "auto" else float(threshold)
    numbers = [threshold, float(overrides.get("min_active", UNSET)), *surrogate.params]
    spikes, mem, v, i, *_ = _forward(
        *inputs, encode_spec(spec), surrogate.kind, numbers, overrides.get("backend", "")
    )
    return spikes, mem, v, None if inputs[7] is None else i
