"""Norse's step without the products that it makes anew each time: ``dt * p.tau_mem_inv`` and the like.

Each is an operator of torch on one number, and takes as long as one on a layer of small size. Upstream's own forward
runs, on a twin of its module whose rates remember what they came to.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core.by_identity import ByIdentity
from .hooks import is_from
from .norse_neurons import builders

MOST = 8
"""Time steps for which a rate remembers its products; a program that changes its time step has more."""

_dispatch_modes = torch._C._len_torch_dispatch_stack


class Rate:
    """A rate that upstream multiplies by its time step, and by nothing else."""

    __slots__ = ("_products", "_rate", "_version")

    def __init__(self, rate: Tensor) -> None:
        self._rate, self._version = rate, rate._version
        self._products: dict[float, Tensor] = {}

    def __rmul__(self, dt: Any) -> Any:
        rate = self._rate
        if type(dt) is not float or rate._version != self._version or rate.requires_grad:
            return dt * rate
        found = self._products.get(dt)
        return self._product(dt) if found is None else found

    def _product(self, dt: float) -> Tensor:
        with torch.inference_mode(False):  # it may take part in a graph later
            product = dt * self._rate
        if type(product) is Tensor and not _dispatch_modes() and len(self._products) < MOST:
            self._products[dt] = product
        return product


class _Known(NamedTuple):
    """A module's parameters and what runs its step, as they were; and these parameters with rates, where it has any."""

    p: Any
    activation: Any
    with_rates: Any


_known: ByIdentity[_Known] = ByIdentity()


def with_products(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """What ``forward`` of one of Norse's cells comes to, bit by bit; ``upstream`` itself where it is not Norse's."""
    if not is_from(upstream, import_module("norse")):
        return upstream

    @wraps(upstream)
    def forward(module: Any, *args: Any, **kwargs: Any) -> Any:
        held = module.__dict__
        found = _known.look(id(module))
        known = _note(module, held) if found is None else found[0]
        if known.p is not held.get("p") or known.activation is not held.get("activation"):
            known = _note(module, held)
        p = known.with_rates
        return upstream(module if p is None else _twin(module, held, p), *args, **kwargs)

    return forward


def _twin(module: nn.Module, held: dict[str, Any], p: Any) -> Any:
    """The module with other parameters ``p``, for one call: a module that knew it would keep it alive."""
    twin = _new(type(module))
    own = twin.__dict__
    own.update(held)
    own["p"] = p
    return twin


_new: Callable[[type], Any] = object.__new__


def _note(module: nn.Module, held: dict[str, Any]) -> _Known:
    p, activation = held.get("p"), held.get("activation")
    if (type(module) if activation is None else activation) not in builders():
        return _Known(p, activation, None)  # not kept: it may refer to the module
    _known[module] = known = _Known(p, activation, _with_rates(p))
    return known


def _with_rates(p: Any) -> Any:
    """These parameters with a :class:`Rate` for each rate without a gradient; None if it has none."""
    if not hasattr(p, "_replace"):
        return None
    fields = p._asdict().items()
    rates = {
        name: Rate(value)
        for name, value in fields
        if name.startswith("tau_")
        and type(value) is Tensor
        and not (value.requires_grad or value.is_inference())
    }
    inner = {name: _with_rates(value) for name, value in fields if name.startswith("lif")}
    rates |= {name: value for name, value in inner.items() if value is not None}
    return p._replace(**rates) if rates else None
