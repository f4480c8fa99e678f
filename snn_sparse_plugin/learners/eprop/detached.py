"""Ordinary backward as e-prop: the spikes that neurons send each other carry no gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from .structure import Intercept, find, replaced


@contextmanager
def detached(
    model: nn.Module,
    *,
    readout: nn.Module | None = None,
    neurons: Iterable[nn.Module] | None = None,
    between_layers: bool = True,
) -> Iterator[nn.Module]:
    """Inside the block, ordinary backward through time gives the e-prop gradient of ``model``.

    Spikes that reach a hidden neuron, from its own layer a step before or from another layer, are detached; those
    that reach the readout are not. For a loss that is a sum over steps this gradient equals :class:`EProp`'s. It
    keeps the whole sequence in memory as any backward does, and needs the readout in the model but nothing else.

    Args:
        model: any model that :class:`EProp` takes, called as usual.
        readout, neurons: as in :class:`EProp`.
        between_layers: False leaves the path from one hidden layer up to the next attached. Layers that do not feed
            the readout themselves get no gradient otherwise. Only recurrence inside a neuron's module is cut then.

    Raises:
        ConfigError: no hidden neuron or no readable readout.

    Example:
        >>> import torch
        >>> from snn_sparse_plugin.learners import eprop
        >>> net = eprop.LSNNNetwork(3, 5, 2)
        >>> with eprop.detached(net) as _:
        ...     state, loss = None, 0.0
        ...     for x in torch.ones(7, 1, 3):
        ...         y, state = net(x, state)
        ...         loss = loss + y.square().sum()
        >>> loss.backward()
    """
    structure = find(model, readout, neurons)
    inside = {m for layer in structure.hidden for m in layer.module.modules()}
    linears = [m for m in model.modules() if isinstance(m, nn.Linear) and m not in inside]
    forwards: dict[nn.Module, Callable[..., Any]] = {m: _gated(m.forward) for m in linears}
    for layer in structure.hidden:
        forwards[layer.module] = _cut(layer.module, between_layers)
        if hasattr(layer.module, "spk"):  # snnTorch's need not be linear
            inner = getattr(layer.module, "recurrent", None)
            forwards |= {} if inner is None else {inner: _fed_back(inner)}
    with replaced(forwards):
        yield model


class _Gate(Function):
    """The identity, until its gradient is cut."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.is_cut = False
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor | None:
        return None if ctx.is_cut else grads[0]


def _gated(linear: Callable[..., Tensor]) -> Callable[..., Tensor]:
    # whether a Linear feeds a hidden neuron is known only when that neuron runs
    return lambda x, *args, **kwargs: linear(_Gate.apply(x), *args, **kwargs)


def _cut_gates(current: Tensor) -> None:
    """Cut the inputs of the Linear layers that ``current`` was made by."""
    seen, waiting = set(), [current.grad_fn]
    while waiting:
        node: Any = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(node, _Gate._backward_cls):  # type: ignore[attr-defined]
            node.is_cut = True  # type: ignore[attr-defined]
        else:
            waiting.extend(after for after, _ in node.next_functions)


def _cut(module: nn.Module, between_layers: bool) -> Callable[..., Any]:
    forward = module.forward
    names = {weight: name for name, weight in module.named_parameters()}

    def linear(x: Tensor, weight: Tensor, *rest: Any, **options: Any) -> Tensor:
        cut = between_layers or "recurrent" in names.get(weight, "")  # type: ignore[call-overload]
        return F.linear(x.detach() if cut else x, weight, *rest, **options)

    def run(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if between_layers:
            _cut_gates(x)
        with Intercept(linear):
            return forward(x, *args, **kwargs)

    return run


def _fed_back(recurrent: nn.Module) -> Callable[..., Any]:
    forward = recurrent.forward
    return lambda x, *args, **kwargs: forward(x.detach(), *args, **kwargs)
