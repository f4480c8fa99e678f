"""Samples of different lengths: each runs for its own steps, and a padded step does no work.

Networks do not know what time it is, so that any samples can run together, each from the step at which it stands. With
runs of 1, 2, 4, ... steps every length is reached exactly: a sample takes part in those whose bit is set in its length.
A batch of any lengths takes log2 T runs then, and no step too many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.csr import entries
from ..core.errors import InputError
from ..core.host import waits
from ..core.spikes import SpikeTrain
from .executor import run, spikes_as_events
from .fused import dense
from .modules import may_mix
from .stepping import Flow, Layer


class Piece(NamedTuple):
    """Samples (k,) that run for ``steps`` steps together, each from its own step ``first`` (k,) on."""

    samples: Tensor
    first: Tensor
    steps: int

    def places(self, B: int) -> Tensor:
        """Rows of these steps in a flow (T * B, ...), (steps * k,)."""
        times = self.first + torch.arange(self.steps).unsqueeze(1)
        return (times * B + self.samples).flatten()


def check(layers: list[Layer], per_step: bool) -> None:
    """Raise :class:`InputError` for a layer that does not allow its samples to run apart."""
    for layer in layers:
        if layer.adapter is not None:
            if layer.adapter.read_state(layer.module) == {}:  # it keeps a state, and there is none
                raise InputError(
                    f"lengths: {layer.label} starts anew at every call. Run it without lengths: padded steps come "
                    f"after a sample's own and change none of them; snn_sparse_plugin.readout leaves them out."
                )
            continue
        inner = layer.wrapper.unwrap(layer.module) if layer.wrapper is not None and not per_step else None
        if layer.stateful or may_mix(inner or layer.module):
            raise InputError(
                f"lengths: {layer.label} may look at several samples (BatchNorm in train mode does), or keep a "
                f"state of its own, and samples of different lengths run apart. Expected are neurons of snnTorch "
                f"and Norse and torch's modules that act on each sample by itself. Run it without lengths, or "
                f"mask the steps in a loop inside sparse_mode()."
            )


def pieces(lengths: Tensor) -> Iterator[Piece]:
    """Runs that together are each sample's own steps: first those that all samples have, then one run for each bit of
    what is left; or up to each length in turn, where there are fewer."""
    done = torch.zeros_like(lengths)
    left = lengths.clone()
    ends = lengths[lengths > 0].unique()
    common = ends[:1]
    bits = int((ends[-1:] - common).sum()).bit_length()
    by_bits = [int(common)] + [1 << bit for bit in reversed(range(bits))] if len(common) else []
    by_ends = ends.diff(prepend=ends.new_zeros(1)).tolist()
    for steps in by_ends if len(by_ends) <= len(by_bits) else by_bits:
        samples = (left >= steps).nonzero().flatten()
        if len(samples):
            yield Piece(samples, done[samples], steps)
            done[samples] += steps
            left[samples] -= steps


def run_ragged(
    layers: list[Layer],
    x: Flow,
    states: list[Any],
    lengths: Tensor,
    *,
    per_step: bool,
    events: bool,
) -> tuple[Flow, Tensor | None, list[Any]]:
    """As :func:`~.executor.run`, each sample for its own steps; what is after them is 0."""
    check(layers, per_step)
    T, B = x.shape[:2]
    if bool((lengths == T).all()):
        return run(layers, x, states, per_step=per_step, events=events)
    if isinstance(x, SpikeTrain) and x.requires_grad:
        x = x.to_dense()
    hidden = [_hidden(layer) if state is None else None for layer, state in zip(layers, states, strict=True)]
    outs: list[Tensor] = []
    mems: list[Tensor | None] = []
    places: list[Tensor] = []
    for piece in pieces(lengths):
        now = [_rows(layer, state, piece, B) for layer, state in zip(layers, states, strict=True)]
        if not outs:
            _put_hidden(layers, hidden, piece, B)
        out, mem, ended = run(layers, _cut(x, piece), now, per_step=per_step)
        if not outs:
            states = [state if own is None else own for state, own in zip(states, hidden, strict=True)]
        states = [_put(*entry, piece, B) for entry in zip(layers, states, ended, strict=True)]
        outs.append(dense(out).flatten(0, 1))
        mems.append(None if mem is None else mem.flatten(0, 1))
        places.append(piece.places(B))
    if not outs:  # of no steps at all only the shapes are wanted
        out, mem, states = run(layers, dense(x)[:0], states, per_step=per_step)
        outs, mems, places = [dense(out).flatten(0, 1)], [None], [torch.zeros(0, dtype=torch.int64)]
    for layer in layers:
        if layer.adapter is not None:
            layer.adapter.begin(layer.module)  # what the last run left is that of some samples
    rows = torch.cat(places).to(x.device)
    spikes = _padded(outs, rows, T, B)
    seen = [m for m in mems if m is not None]
    mem = _padded(seen, rows, T, B) if len(seen) == len(outs) else None
    return (spikes_as_events(spikes, layers) if events else spikes), mem, states


def _padded(parts: list[Tensor], rows: Tensor, T: int, B: int) -> Tensor:
    """(T, B, ...) with these rows, and 0 elsewhere."""
    values = torch.cat(parts)
    return values.new_zeros(T * B, *values.shape[1:]).index_copy(0, rows, values).unflatten(0, (T, B))


def _cut(x: Flow, piece: Piece) -> Flow:
    """The input of a piece, (steps, k, ...)."""
    steps, k = piece.steps, len(piece.samples)
    if isinstance(x, SpikeTrain):
        if waits(x.tensors()[0]) and x.values is None:
            words = x.words.flatten(0, 1)[piece.places(x.B).to(x.device)].unflatten(0, (steps, k))
            return SpikeTrain.from_words(words, (steps, k, *x.shape[2:]), dtype=x.dtype)
        return _cut_events(x, piece)
    if k == x.shape[1] and not piece.first.any():
        return x[:steps]
    if x.stride(0) == 0:  # the same input at every step stays one
        one = x[0].index_select(0, piece.samples.to(x.device))
        return one.expand(steps, *one.shape)
    return x.flatten(0, 1).index_select(0, piece.places(x.shape[1]).to(x.device)).unflatten(0, (steps, k))


def _cut_events(x: SpikeTrain, piece: Piece) -> SpikeTrain:
    first = (piece.samples * x.T + piece.first).unsqueeze(1)
    rows = (first + torch.arange(piece.steps)).flatten().to(x.device)
    found = entries(x.indptr, rows).positions
    indptr = torch.zeros(len(rows) + 1, dtype=torch.int32, device=x.device)
    indptr[1:] = (x.indptr[rows + 1] - x.indptr[rows]).cumsum(0)
    return SpikeTrain(
        indptr,
        x.indices[found],
        (piece.steps, len(piece.samples), *x.shape[2:]),
        None if x.values is None else x.values[found],
        dtype=x.dtype,
        check=False,
    )


# --- states: dicts by name, or tuples which may be nested, of tensors (B, ...) ---


def _hidden(layer: Layer) -> Any:
    return layer.adapter.read_state(layer.module) if layer.adapter is not None else None


def _put_hidden(layers: list[Layer], hidden: list[Any], piece: Piece, B: int) -> None:
    """Start the first run from hidden states. Upstream decides whether they fit, and not by the size of the piece."""

    def rows(x: Tensor) -> Tensor:
        if x.dim() < 2:
            return x  # of a neuron that has not run
        return x.index_select(0, piece.samples.to(x.device)) if len(x) == B else x.new_zeros(0)

    for layer, own in zip(layers, hidden, strict=True):
        if own is not None:
            assert layer.adapter is not None
            layer.adapter.write_state(layer.module, _mapped(rows, own))


def _rows(layer: Layer, state: Any, piece: Piece, B: int) -> Any:
    """The state of a piece's samples."""

    def rows(x: Tensor) -> Tensor:
        if x.dim() < 2 or len(x) == 1:
            return x  # one for all samples
        if len(x) != B:
            raise InputError(f"{layer.label}: a state of shape {tuple(x.shape)}, expected {B} samples.")
        return x.index_select(0, piece.samples.to(x.device))

    return _mapped(rows, state)


def _put(layer: Layer, whole: Any, part: Any, piece: Piece, B: int) -> Any:
    """The state of all samples, with that of a piece's samples in its place."""
    if part is None or len(piece.samples) == B:
        return whole if part is None else part
    if whole is None or (isinstance(whole, dict) and not _fits(whole, part, B)):
        assert layer.adapter is not None
        whole = layer.adapter.first_state(layer.module, part, B)

    def put(all_rows: Tensor, rows: Tensor) -> Tensor:
        if rows.dim() < 2:
            return rows
        dtype = torch.promote_types(all_rows.dtype, rows.dtype)
        all_rows = all_rows.to(dtype).expand(B, *rows.shape[1:])
        return all_rows.index_copy(0, piece.samples.to(rows.device), rows.to(dtype))

    return _mapped(put, whole, part)


def _fits(whole: dict[str, Tensor], part: dict[str, Tensor], B: int) -> bool:
    """Whether these hidden states are those that the part began with: upstream starts anew from others."""
    begun = ((whole[name], rows) for name, rows in part.items())
    return all(x is not None and x.shape == (B, *rows.shape[1:]) for x, rows in begun)


def _mapped(change: Callable[..., Tensor], state: Any, *others: Any) -> Any:
    """``change`` of each tensor, and of those in the same places of other states."""
    if isinstance(state, Tensor):
        return change(state, *others)
    if isinstance(state, dict):
        return {name: _mapped(change, v, *(other[name] for other in others)) for name, v in state.items()}
    if isinstance(state, tuple):
        parts: Sequence[Any] = [_mapped(change, *values) for values in zip(state, *others, strict=True)]
        return type(state)(*parts)
    return state
