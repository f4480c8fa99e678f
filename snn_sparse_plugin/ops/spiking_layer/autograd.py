"""Autograd of eager calls: keeps what is smallest, so the shapes of what it saves depend on the data.

Layers that follow each other without anything between them are one node of the graph, as a node takes longer than a
small layer. Events that others may read as well, and the states of all layers, have places of their own in the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...backends.product import ProductGrad
from ...core import tally
from ...core.backend import (
    Backend,
    LayerBackward,
    LayerCall,
    LayerResult,
    Needs,
    OutputGrads,
    Saved,
    enter,
    passed_on,
)
from ...core.once import made_once
from ...core.precision import without_autocast
from ...core.spikes import Active, SpikeTrain
from ...core.surrogates import once, plain_apply
from . import again

_LEAVES = ("current", "dense", "weight", "bias", "rec_weight", "rec_bias", "rec0", "v0", "i0", "params")
_leaves, _backend = attrgetter(*_LEAVES), attrgetter("backend")
_NOTHING: dict[str, Any] = dict.fromkeys(("train", *_LEAVES))
_N = len(_LEAVES)


class Link(NamedTuple):
    """A layer of a chain; ``call`` has no input where that is what the link before emits. ``shown``: others than the
    next link may read its events."""

    call: LayerCall
    backend: Backend
    ran: tally.Record
    shown: bool = True


def apply_chain(links: Sequence[Link]) -> tuple[list[LayerResult], list[Tensor | None]]:
    """Run layers one after the other: -> (their results, the carriers of the events of those that are shown).

    The states of all of them, and spikes and membranes of the last one, carry the graph.
    """
    first = links[0].call
    carrier = first.train.carrier if first.train is not None else None
    leaves = [x for link in links for x in _leaves(link.call)]
    if first.current is not None and first.current.shape[0] != first.T:
        first.current, first.once = _of_all_steps(first.current, first.T), True
    results: list[LayerResult] = []
    if not links[-1].call.needs_grad:
        return _run(links), [None] * len(links)
    ordinary = _ORDINARY.issuperset(map(type, leaves)) and not _transforms()
    run = _apply if ordinary else _SpikingLayer.apply
    spikes, mem, *others = run(links, results, carrier, *leaves)
    carriers, v, i = others[::3], others[1::3], others[2::3]
    results = [r._replace(v=v[k], i=i[k]) for k, r in enumerate(results)]
    results[-1] = results[-1]._replace(spikes=spikes, mem=mem)
    return results, carriers


def _run(links: Sequence[Link]) -> list[LayerResult]:
    """Links that follow each other on one backend are its to run together."""
    results: list[LayerResult] = []
    for backend, together in groupby(links, _backend):
        calls = [link.call for link in together]
        if results:
            enter(calls[0], results[-1])
        results += backend.spiking_layers(calls)
        assert all(call.train is not None for call in calls[1:]), (
            f"{backend.name} entered no events into a call"
        )
    return results


def _of_all_steps(current: Tensor | None, T: int) -> Tensor | None:
    """A current of one step (1, B, N) that comes at every step, as (T, B, N)."""
    return current if current is None or current.shape[0] == T else current.expand(T, -1, -1)


class _Kept(NamedTuple):
    """What a node keeps of a layer besides tensors."""

    call: LayerCall  # without its tensors
    backend: Backend
    ran: tally.Record
    threshold: float | None
    adds_rows: bool | None
    learns: bool
    train: tuple[torch.Size, torch.dtype] | None  # of the events that enter


class _SpikingLayer(torch.autograd.Function):
    """Inputs: links, room for their results, the carrier of the events that enter, and the leaves of each link.

    Outputs: spikes and membranes of the last link, and of each the carrier of its events and its states (v, i).
    """

    @staticmethod
    def forward(
        ctx: Any,
        links: Sequence[Link],
        results: list[LayerResult],
        carrier: Tensor | None,
        *leaves: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        first = links[0]
        kept: list[Tensor | None] = [carrier, *_of_train(first.call.train, first.backend)]
        ctx.links = []
        others: list[Tensor | None] = []
        still: list[Tensor | None] = []
        results += _run(links)
        for k, ((call, backend, ran, shown), result) in enumerate(zip(links, results, strict=True)):
            saved, train = result.saved or _NONE, call.train
            carrier_out = None
            if call.needs_grad and call.want_events and shown:
                shape = (call.T, call.B, call.N) if saved.active is None else saved.active.indices.shape
                carrier_out = _zero_of(result.v).expand(shape)
            others += carrier_out, result.v, result.i
            still += () if call.needs_grad else (result.v, result.i)
            of_train = None if train is None else (train.shape, train.dtype)
            bare = call.changed(**_NOTHING)
            ctx.links.append(
                _Kept(bare, backend, ran, saved.threshold, saved.adds_rows, call.needs_grad, of_train)
            )
            own = leaves[k * _N : (k + 1) * _N]
            kept += own if saved.needs_current else (None, *own[1:])
            kept += saved.u, saved.v_checkpoints, saved.i_checkpoints, saved.mem, saved.near, result.words
            kept += saved.rows, *(saved.active or _PAIR), *(result.events or _PAIR)
        ctx.save_for_backward(*kept)
        if still:
            ctx.mark_non_differentiable(*(x for x in still if x is not None))
        return result.spikes, result.mem, *others

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        with without_autocast():
            return _SpikingLayer._backward(ctx, *grads)

    @staticmethod
    def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        kept, links, wanted = _saved(ctx), ctx.links, ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():  # create_graph=True
            return (None, None, *_differentiable(ctx, kept, wanted, grads))
        out: list[Tensor | None] = [None] * len(wanted)
        spikes, mem = grads[:2]  # of the last link
        arriving: Tensor | None = None  # of a link's events, from the one behind
        end = len(links)
        while end:
            of_events, v, i = _of_link(grads, end - 1)
            here = _sum(arriving, of_events), spikes, mem, v, i
            arriving = spikes = mem = None
            first = end - 1
            if links[first].learns and any(x is not None for x in here):
                while first and _gets_no_more(links, grads, first - 1):
                    first -= 1
                layers = [_backward_of(links, kept, wanted, k) for k in range(first, end)]
                backend = links[first].backend
                found = backend.spiking_layers_backward(layers, _arriving(backend, layers[-1].saved, *here))
                for k, each in enumerate(found, first):
                    links[k].ran.count_soon("backward")
                    out[3 + k * _N : 1 + (k + 1) * _N] = each[1:]
                arriving, call = found[0].input, layers[0].call
            end = first
        if arriving is not None:
            if call.once and len(arriving) > 1:
                arriving = arriving.sum(0, keepdim=True)
            out[0 if call.train is not None else 1 if call.dense is None else 2] = arriving
        return (None, None, *out)


def _zero_of(x: Tensor) -> Tensor:
    """A zero of its dtype and device. A CUDA graph makes its own, as it outlives what is kept here."""
    return _zero_on_cpu(x.dtype) if x.device.type == "cpu" else x.new_zeros(())


@made_once(8)
def _zero_on_cpu(dtype: torch.dtype) -> Tensor:
    return torch.zeros((), dtype=dtype, device="cpu")


_apply: Any = plain_apply(_SpikingLayer)
_ORDINARY = {Tensor, nn.Parameter, type(None)}
"""Types of what nobody asks for a function of its own."""
_transforms = torch._C._are_functorch_transforms_active

# --- what is kept for the backward ---

_PAIR = (None, None)
_NONE = Saved(None)
_FIRST = 6  # the carrier and the events that enter
_EACH = _N + 11  # of each link: its leaves and what its forward left


def _saved(ctx: Any) -> tuple[Any, ...]:
    """What was kept for the backward, or torch's error, with a note of what it mostly means in a spiking network."""
    try:
        kept: tuple[Any, ...] = ctx.saved_tensors
    except RuntimeError as error:
        if "second time" in str(error) and hasattr(error, "add_note"):  # from Python 3.11 on
            error.add_note(
                f"{ctx.links[-1].call.name}: the state of these neurons comes from steps whose backward has run, such "
                "as those of the batch before: begin with a new one (snntorch.utils.reset(net), "
                "mem = lif.init_leaky(), state = None), or cut it off (lif.detach_hidden(), mem.detach()). If the same "
                "loss is meant, pass retain_graph=True to its first backward."
            )
        raise
    return kept


def _of_train(train: SpikeTrain | None, backend: Backend) -> tuple[Tensor | None, ...]:
    if train is None:
        return (None,) * 5
    as_bits = backend.takes_dense and train.values is None
    forms = (train.words, None) if as_bits else (train.indptr, train.indices)
    return (*forms, train.values, *(train.active or _PAIR))


def _restored(
    links: list[_Kept], kept: tuple[Any, ...], k: int
) -> tuple[LayerCall, Saved, tuple[Tensor, Tensor] | None]:
    """The call of a link with its tensors, what its forward saved, and the events that it emitted."""
    of, at = links[k], _FIRST + k * _EACH
    call = of.call.changed(**dict(zip(_LEAVES, kept[at : at + _N], strict=True)))
    call.current = _of_all_steps(call.current, call.T)
    u, v, i, mem, near, words, call.rows, *lists = kept[at + _N : at + _EACH]
    if of.train is not None:
        if k == 0:
            call.train = _train(of.train, *kept[1:_FIRST])
        else:
            *_, below, _, in_ptr, in_idx, ev_ptr, ev_idx = kept[at - _EACH : at]
            first, indices = (ev_ptr, ev_idx) if below is None else (below, None)
            call.train = _train(of.train, first, indices, None, in_ptr, in_idx)
    act_ptr, act_idx, ev_ptr, ev_idx = lists
    active = None if act_ptr is None else Active(act_ptr, act_idx)
    own = {"mem": mem, "near": near, "words": words, "adds_rows": of.adds_rows}
    return call, Saved(of.threshold, active, u, v, i, **own), None if ev_ptr is None else (ev_ptr, ev_idx)


def _train(
    like: tuple[torch.Size, torch.dtype],
    first: Tensor,
    indices: Tensor | None,
    values: Tensor | None,
    in_ptr: Tensor | None,
    in_idx: Tensor | None,
) -> SpikeTrain:
    shape, dtype = like
    active = None if in_ptr is None or in_idx is None else Active(in_ptr, in_idx)
    if indices is None:
        return SpikeTrain.from_words(first, shape, dtype=dtype, active=active)
    return SpikeTrain._of_events((first, indices), shape, dtype, active=active, values=values)


# --- gradients on their way ---


def _of_link(grads: tuple[Tensor | None, ...], k: int) -> tuple[Tensor | None, ...]:
    """Those of its events and of its states v and i that do not come from the next link."""
    return grads[2 + 3 * k : 5 + 3 * k]


def _gets_no_more(links: list[_Kept], grads: tuple[Tensor | None, ...], k: int) -> bool:
    """Whether a link gets nothing but what the next one, on the same backend, passes on."""
    alone = all(x is None for x in _of_link(grads, k))
    return alone and links[k].learns and links[k].backend is links[k + 1].backend


def _backward_of(
    links: list[_Kept], kept: tuple[Any, ...], wanted: tuple[bool, ...], k: int
) -> LayerBackward:
    call, saved, events = _restored(links, kept, k)
    of_current, of_dense, *others = wanted[1 + k * _N : 1 + (k + 1) * _N]
    below = links[k - 1].learns if k else wanted[0]
    return LayerBackward(call, saved, events, Needs(below or of_current or of_dense, *others))


def _sum(x: Tensor | None, y: Tensor | None) -> Tensor | None:
    if x is None or y is None:
        return y if x is None else x
    return (x.dense() if isinstance(x, ProductGrad) else x) + y


def _arriving(
    backend: Backend,
    saved: Saved,
    of_events: Tensor | None,
    spikes: Tensor | None,
    mem: Tensor | None,
    v: Tensor | None,
    i: Tensor | None,
) -> OutputGrads:
    active = None
    if of_events is not None:
        active, of_spikes, *_ = passed_on(saved, of_events)
        spikes = _sum(spikes, of_spikes)
    if isinstance(spikes, ProductGrad) and not backend.takes_products:
        spikes = spikes.dense()
    return OutputGrads(active, spikes, mem, v, i)


def _differentiable(
    ctx: Any, kept: tuple[Any, ...], wanted: tuple[bool, ...], grads: tuple[Tensor | None, ...]
) -> list[Tensor | None]:
    """What backward returns, but for what is no tensor, as a function of the op's inputs and of ``grads``."""
    links, first = ctx.links, ctx.links[0]
    leaves = [x for k in range(len(links)) for x in kept[_FIRST + k * _EACH :][:_N]]
    current, dense = leaves[:2]
    if first.train is None and current is None and dense is None:  # not kept, as a window needs it nowhere
        with torch.no_grad():
            numbers = _SpikingLayer.backward(ctx, *grads)[2:]
        return [None if g is None else once(g, f"the gradient of {first.call.name}") for g in numbers]
    grads = tuple(g.dense() if isinstance(g, ProductGrad) else g for g in grads)
    if len(links) > 1:
        return _one_by_one(links, kept, leaves, grads)
    first.ran.count_soon("backward")
    call, saved, _ = _restored(links, kept, 0)
    named = dict(zip(("carrier", *_LEAVES), (kept[0], *leaves), strict=True))
    spikes, mem, of_events, *states = grads
    found = again.gradients(call, call.surrogate, saved, call.train, named, (of_events, spikes, mem, *states))
    return [found.get(name) if need else None for name, need in zip(named, wanted, strict=True)]


def _one_by_one(
    links: list[_Kept], kept: tuple[Any, ...], leaves: list[Tensor | None], grads: tuple[Tensor | None, ...]
) -> list[Tensor | None]:
    """The gradients of a chain, made again link by link: each a node that can be differentiated."""
    with torch.enable_grad():
        # views, as one leaf may be made of another
        inner = [x.view_as(x) if x is not None and x.requires_grad else x for x in (kept[0], *leaves)]
        carrier = inner[0]
        others: list[Tensor | None] = []
        for k, link in enumerate(links):
            call, _, _ = _restored(links, kept, k)
            own = dict(zip(_LEAVES, inner[1 + k * _N :][:_N], strict=True))
            train = None if call.train is None else call.train._replace(carrier=carrier)
            call = call.changed(**own, train=train, rows=None)
            (result,), (carrier,) = apply_chain([Link(call, link.backend, link.ran)])
            others += carrier, result.v, result.i
        made = zip((result.spikes, result.mem, *others), grads, strict=True)
        outs, arriving = zip(*[(x, g) for x, g in made if g is not None], strict=True)
        asked = [x for x in inner if x is not None and x.requires_grad]
        found = iter(torch.autograd.grad(outs, asked, arriving, create_graph=True, allow_unused=True))
    return [next(found) if x is not None and x.requires_grad else None for x in inner]
