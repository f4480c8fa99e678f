"""Which modules of a model are hidden neurons and which one is the readout, and how their calls are watched."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...adapters import Adapter, adapter_of
from ...core.errors import ConfigError
from .lsnn import LSNN
from .network import LeakyReadout

# Norse's integrators without a threshold
_NORSE_READOUTS = ("LI", "LICell", "LILinearCell", "LIBoxCell")


class Layer(NamedTuple):
    """A neuron module of the model: its name there and the adapter of its library, if it has one."""

    name: str
    module: nn.Module
    adapter: Adapter | None


class Structure(NamedTuple):
    """The hidden spiking layers of a model, in order of registration, and its readout: a neuron or a Linear."""

    hidden: list[Layer]
    readout: Layer


def find(model: nn.Module, readout: nn.Module | None, neurons: Iterable[nn.Module] | None) -> Structure:
    """The neurons and the readout of ``model``.

    Args:
        readout: the readout module, if it should not be found; a leaky integrator or an ``nn.Linear``.
        neurons: the hidden neurons, if they should not be found, e.g. modules of your own.

    Raises:
        ConfigError: there is no hidden neuron, or no readable readout.
    """
    named = {module: name for name, module in model.named_modules()}
    given = None if neurons is None else list(neurons)
    for module in [*(given or ()), *(() if readout is None else (readout,))]:
        if module not in named:
            raise ConfigError(f"EProp: {type(module).__name__} is not a module of the model.")
    layers = []
    for module, name in named.items():
        adapter = None if isinstance(module, LSNN | LeakyReadout) else adapter_of(module)
        known = adapter is not None or isinstance(module, LSNN | LeakyReadout)
        if known if given is None else module in given or module is readout:
            layers.append(Layer(name or "model", module, adapter))
    if readout is None:
        found = _readout(model, named, layers)
    else:
        found = next((x for x in layers if x.module is readout), Layer(named[readout], readout, None))
    hidden = [x for x in layers if x.module is not found.module]
    if not hidden:
        raise ConfigError(
            f"EProp: {type(model).__name__} has no hidden spiking neuron (snnTorch's, Norse's, LSNN); "
            "name modules of your own with neurons=[...]."
        )
    return Structure(hidden, found)


def _readout(model: nn.Module, named: dict[nn.Module, str], layers: list[Layer]) -> Layer:
    silent = [x for x in layers if is_integrator(x.module)]
    if len(silent) == 1:
        return silent[0]
    inner = {m for x in layers for m in x.module.modules() if m is not x.module}
    order = [
        m
        for m in named
        if m not in inner and (isinstance(m, nn.Linear) or any(x.module is m for x in layers))
    ]
    last = order[-1] if order and not silent else None
    if isinstance(last, nn.Linear):
        return Layer(named[last], last, None)
    for layer in layers:
        if layer.module is last and layer.adapter is not None and layer.adapter.name == "snntorch":
            return layer
    why = (
        f"{len(silent)} leaky integrators"
        if silent
        else "no leaky integrator and no Linear after its neurons"
    )
    raise ConfigError(
        f"EProp: {type(model).__name__} has no readable readout ({why}). E-prop needs one linear readout: a Linear, "
        "Norse's LI, snnTorch's Leaky(reset_mechanism=\"none\") or LeakyReadout. Name it with readout=module."
    )


def is_integrator(module: nn.Module) -> bool:
    """Whether the module is a leaky integrator by its class."""
    if isinstance(module, LeakyReadout):
        return True
    return type(module).__name__ in _NORSE_READOUTS and type(module).__module__.startswith("norse.")


# --- watching calls ---


@contextmanager
def replaced(forwards: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Inside the block each module runs the given function as its ``forward``; undone on any exit."""
    before = {module: vars(module).get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, old in before.items():
            if old is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = old


class Intercept(TorchFunctionMode):
    """Inside the block ``F.linear``, and so every ``nn.Linear``, calls ``linear`` instead."""

    def __init__(self, linear: Callable[..., Tensor]) -> None:
        self.linear = linear

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # a mode is off inside its own handler: ``linear`` may call F.linear
        return (self.linear if func is F.linear else func)(*args, **(kwargs or {}))
