"""What resets a neuron of snnTorch, without the graph that upstream makes for it and throws away."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core.by_identity import ByIdentity
from . import active
from .active import config_of, here
from .hooks import is_from
from .snntorch_surrogates import form_of, is_made_by_factory, is_upstreams

_function_modes, _dispatch_modes = torch._C._len_torch_function_stack, torch._C._len_torch_dispatch_stack
_tracing = torch._C._is_tracing
_TENSORS = Tensor, nn.Parameter


def without_graph(upstream: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The hook on ``mem_reset``: 1 where the membrane is above the threshold, whatever the surrogate, detached."""
    known = _is_known(upstream)

    def mem_reset(self: Any, mem: Any) -> Tensor:
        # what compiles without Dynamo gives tensors of another type
        if not active.idle and known and type(mem) is Tensor and not torch.compiler.is_dynamo_compiling():
            whole = here.whole
            if (whole is not None and whole[0] is self) or config_of(self) is not None:
                threshold = self.threshold
                if (
                    type(threshold) in _TENSORS
                    and threshold.dtype is mem.dtype
                    and _fires_above_zero(self)
                    and not (_function_modes() or _dispatch_modes() or _tracing())
                ):
                    # a difference is above zero where its first number is above the second
                    return torch.gt(mem, threshold).float()
        return upstream(self, mem)

    return mem_reset


def _is_known(function: Any) -> bool:
    """Whether this is snnTorch's own, as it is in all versions that are tested."""
    names = "threshold", "spike_grad", "clone", "detach"
    return is_from(function, import_module("snntorch")) and function.__code__.co_names == names


class _Heaviside(NamedTuple):
    """A spike function of snnTorch's factories, what it applies, under which name, and the forward of that."""

    function: Any
    code: Any
    home: dict[str, Any]
    name: str
    applies: Any
    forward: Any


_found: ByIdentity[_Heaviside] = ByIdentity()


def _fires_above_zero(module: nn.Module) -> bool:
    """Whether the neuron's spikes are ``(x > 0).float()``, as those of all of snnTorch's spike functions."""
    function, found = module.__dict__.get("spike_grad"), _found.look(id(module))
    if found is None or found[0].function is not function or found[0].code is not function.__code__:
        return _look(module, function)
    known = found[0]
    return (
        known.home.get(known.name) is known.applies and known.applies.__dict__.get("forward") is known.forward
    )


def _look(module: nn.Module, function: Any) -> bool:
    if not is_made_by_factory(function):
        return False
    name = form_of(function)[0]
    applies = function.__globals__.get(name)
    if applies is None or not is_upstreams(applies):
        return False
    looked_at = function, function.__code__, function.__globals__, name
    _found[module] = _Heaviside(*looked_at, applies, vars(applies)["forward"])
    return True
