"""From a network with ReLUs or spiking neurons to TTFS layers: :func:`to_ttfs`."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from ...adapters import Neuron, loaded_adapters
from ...core.dynamics import NeuronSpec
from ...core.errors import UnsupportedError
from .neuron import TTFS, TTFSEncoder, TTFSMaxPool2d
from .training import TTFSBatchNorm1d, TTFSBatchNorm2d

_OURS = {nn.MaxPool2d: TTFSMaxPool2d, nn.BatchNorm1d: TTFSBatchNorm1d, nn.BatchNorm2d: TTFSBatchNorm2d}


def is_neuron(module: nn.Module) -> bool:
    """Whether it is a spiking neuron of a library that has been imported."""
    return any(adapter.owns(module) for adapter in loaded_adapters())


def to_ttfs(model: nn.Module, *, encode: bool = True, **options: Any) -> nn.Module:
    """A copy of the model in which ReLUs and spiking neurons are :class:`TTFS` layers.

    Max pooling becomes :class:`TTFSMaxPool2d`, batch normalisation the same with a hook for
    :func:`spike_regularization`; weights are copied. A spiking neuron of snnTorch or Norse becomes one TTFS layer: the
    window is its time, so the model is then called once, not step by step. One that ends the model is left out: the
    membrane is read.

    Args:
        model: any module; its children are replaced by type.
        encode: put a :class:`TTFSEncoder` in front.
        options: of :class:`TTFS`; the encoder takes ``window`` from them.

    Raises:
        UnsupportedError: nothing to replace, a recurrent neuron, or one that a forward of its own steps through time.

    Example:
        >>> to_ttfs(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), window=16)
        Sequential(
          (0): TTFSEncoder(window=16, tau=10, t_d=0, train_kernel=False)
          (1): Linear(in_features=4, out_features=8, bias=True)
          (2): TTFS(window=16, tau=10, t_d=0)
          (3): Linear(in_features=8, out_features=2, bias=True)
        )
    """
    model = copy.deepcopy(model, _states(model))
    last = [m for m in model.modules() if not list(m.children())][-1]
    replaced: dict[int, nn.Module] = {}

    def replacement(name: str, child: nn.Module, in_sequence: bool) -> nn.Module | None:
        if isinstance(child, nn.ReLU):
            return TTFS(**options)
        for adapter in loaded_adapters():
            if adapter.owns(child):
                neuron = adapter.neuron(child)
                why = neuron if isinstance(neuron, str) else _why_not(neuron, child is last)
                if why is None and not in_sequence and not _spikes_alone(child):
                    why = (
                        "the forward around it hands it a state, and a TTFS layer is called once and without: put "
                        "the layers into nn.Sequential"
                    )
                if why:
                    raise UnsupportedError(
                        f"to_ttfs cannot replace {name.removeprefix('model.')} ({type(child).__name__}): {why}."
                    )
                return nn.Identity() if child is last else TTFS(**options)
            if adapter.container(child):  # its time loop is not needed any more
                return nn.Sequential(*child.children())
        ours = _OURS.get(type(child))
        if ours is not None:
            child.__class__ = ours  # the same module, its parameters and hooks, as a subclass
        return None

    def convert(parent: nn.Module, prefix: str) -> None:
        for name, child in list(parent._modules.items()):  # a shared child is listed at each of its places
            if child is None:
                continue
            if id(child) not in replaced:
                in_sequence = isinstance(parent, nn.Sequential) or parent is root
                replaced[id(child)] = replacement(prefix + name, child, in_sequence) or child
            setattr(parent, name, replaced[id(child)])
            convert(replaced[id(child)], f"{prefix}{name}.")

    root = nn.ModuleDict({"model": model})
    convert(root, "")
    model = root["model"]
    if not any(isinstance(m, TTFS) for m in model.modules()):
        raise UnsupportedError(
            "to_ttfs found no nn.ReLU and no spiking neuron among the model's modules; a call of F.relu has to be "
            "one of an nn.ReLU."
        )
    if not encode or any(isinstance(m, TTFSEncoder) for m in model.modules()):
        return model
    encoder = TTFSEncoder(**{k: v for k, v in options.items() if k in ("window", "backend")})
    layers = list(model) if type(model) is nn.Sequential else [model]
    return nn.Sequential(encoder, *layers)


def _states(model: nn.Module) -> dict[int, Any]:
    """What deepcopy is to take for tensors of a graph, which it refuses: states that a run has left in neurons."""
    held = (t for m in model.modules() for t in (*vars(m).values(), *m._buffers.values()))
    return {id(t): t.detach() for t in held if isinstance(t, Tensor) and not t.is_leaf}


def _spikes_alone(neuron: nn.Module) -> bool:
    """Whether the neuron keeps its state and returns spikes, as a snnTorch one with ``init_hidden``."""
    return bool(getattr(neuron, "init_hidden", False) and not getattr(neuron, "output", False))


def _why_not(neuron: Neuron, last: bool) -> str | None:
    """Why a spiking neuron cannot become a TTFS layer."""
    if neuron.recurrent:
        return "it feeds its spikes back, and a neuron that spikes once has nothing to feed back"
    if neuron.input_weight is not None:
        return "it holds its own synapses: give them a linear layer"
    if isinstance(neuron.spec, NeuronSpec) and not neuron.spec.spiking and not last:
        return "a neuron that does not spike can only be read, at the end"
    return None
