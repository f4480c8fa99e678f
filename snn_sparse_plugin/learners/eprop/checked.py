"""Whether a saved state is one of this model's learner, before anything takes it: kernels index with its shapes."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from ...files import reading
from .scan import Filter

_LAYER = {"steps", "rate", "states", "shared", "weights", "synapses"}
_ENTRIES = {"steps_seen", "batch", "filter", "indirect", "feedback", "layers", "compiled", "buffers"}


def fitting() -> AbstractContextManager[None]:
    """Any error inside the block is raised as one of a saved state that does not fit the model."""
    what = "one that EProp.state_dict gave for this model"
    return reading("the state given to EProp.load_state_dict", what, "Begin with a new learner.")


def check_state(model: nn.Module, names: dict[nn.Parameter, str], state: Any) -> None:
    """Raise :class:`InputError` where a state lacks parts, or has some of other shapes than this model's."""
    with fitting():
        _entries("the state", state, _ENTRIES)
        shapes = {name: tuple(parameter.shape) for parameter, name in names.items()}
        batch = state["batch"]
        _counts("steps_seen", state["steps_seen"])
        if batch is not None:
            _counts("batch", batch)
        _filter(state["filter"])
        indirect = state["indirect"]
        if indirect is not None and not set(indirect) <= set(state["layers"]):
            raise ValueError(f"signals come to {', '.join(map(str, indirect))} indirectly")
        for part in ("matrices", "followed"):
            for name, matrix in state["feedback"][part].items():
                _tensor(f"feedback of {name}", matrix, shapes[name])
        for name, layer in state["layers"].items():
            _layer(name, layer, shapes, batch)
        modules = dict(model.named_modules())
        for name, value in state["buffers"].items():
            owner, _, buffer = name.rpartition(".")
            if buffer not in modules[owner]._buffers:
                raise ValueError(f"there is no buffer {name}")
            _tensor(name, value)
        for part in state["compiled"]:
            for name, value in part.items():
                _tensor(name, value)


def _filter(found: Any) -> None:
    if found is None:
        return
    if not isinstance(found, Filter):
        raise ValueError(f"filter is {type(found).__name__}")
    _tensor("filter", found.b)
    _tensor("filter", found.A, (found.b.numel(), found.b.numel()))
    if found.b.dim() != 1 or not isinstance(found.out, int) or not 0 <= found.out < max(1, len(found.b)):
        raise ValueError(f"filter has no component {found.out}")


def _layer(name: str, layer: Any, shapes: dict[str, tuple[int, ...]], batch: int | None) -> None:
    _entries(f"layer {name}", layer, _LAYER)
    _counts(f"steps of layer {name}", layer["steps"])
    if layer["rate"] is not None:
        _tensor(f"rate of layer {name}", layer["rate"])
    for k in layer["states"]:
        _counts(f"a state of layer {name}", k)
    if not {*layer["weights"], *layer["synapses"]} <= set(shapes):
        raise ValueError(f"layer {name} has weights that the model lacks")
    for weight, saved in layer["synapses"].items():
        _synapses(weight, saved, shapes[weight], batch)


def _synapses(name: str, saved: Any, shape: tuple[int, ...], batch: int | None) -> None:
    # a bias of N neurons is (N, 1), and (N,) where its gradient was found elsewhere
    stored = tuple(saved["shape"])
    if stored not in (shape, (*shape, 1)):
        raise ValueError(f"{name} is {shape}, its traces are of {stored}")
    for what, at in (("mask", saved["mask"]), ("gradient", saved["grad"])):
        if at is not None:
            _tensor(f"{what} of {name}", at, stored)
    kept = stored
    if saved["exists"] is not None:
        rows, columns = saved["exists"]
        kept = (len(rows),)
        for index, size in ((rows, stored[0]), (columns, stored[1])):
            _tensor(f"existing synapses of {name}", index, kept)
            if index.dtype != torch.int64 or (
                len(index) and not 0 <= int(index.min()) <= int(index.max()) < size
            ):
                raise ValueError(f"existing synapses of {name} lie outside {stored}")
    for kind, rest in (("per_input", stored[1:]), ("per_synapse", kept)):
        for component, trace in saved[kind].items():
            if not isinstance(component, int):
                raise ValueError(f"traces of {name} are of {component!r}")
            _tensor(f"traces of {name}", trace, None if batch is None else (batch, *rest))


def _entries(what: str, found: Any, expected: set[str]) -> None:
    if not isinstance(found, dict) or set(found) != expected:
        entries = ", ".join(map(str, found)) if isinstance(found, dict) else type(found).__name__
        raise ValueError(f"{what} has {entries}, expected {', '.join(sorted(expected))}")


def _counts(what: str, value: Any) -> None:
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"{what} is {value!r}")


def _tensor(what: str, value: Any, shape: tuple[int, ...] | None = None) -> None:
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        raise ValueError(f"{what} is {type(value).__name__}, expected a tensor")
    if shape is not None and tuple(value.shape) != shape:
        raise ValueError(f"{what} is {tuple(value.shape)}, expected {shape}")
