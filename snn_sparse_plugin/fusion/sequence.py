"""``unroll``: a sequential network over all time steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..adapters import Adapter, config_of, entered, has_hooks, loaded_adapters, refuse
from ..core.config import current_config
from ..core.errors import InputError, NonFiniteError
from ..core.lengths import read_lengths
from ..core.spikes import SpikeTrain, as_spike_train, check_float, is_sparse_input
from .boundaries import install
from .executor import run, run_neuron
from .fused import FusedCall
from .neurons import settle, step
from .ragged import run_ragged
from .stepping import Flow, Layer
from .straight import form_of, keep, recall
from .wrapped import warn_of_gradients_that_stay_apart, what_to_write

__all__ = ["Unrolled", "unroll"]


class Unrolled(NamedTuple):
    """``spikes`` and ``mem`` (T, B, N...) of the last layer, and ``state``, one entry per layer."""

    spikes: Any
    mem: Tensor | None
    state: list[Any]


def unroll(
    net: nn.Module,
    x: Tensor | SpikeTrain | Any,
    state: Sequence[Any] | None = None,
    *,
    lengths: Any = None,
    events: bool = False,
    batch_size: int | None = None,
    **overrides: Any,
) -> Unrolled:
    """Run a sequential network over all steps at once; the result is that of the step loop.

    A ``Linear`` directly before a neuron runs with it in one fused call over all steps, and hidden spikes
    travel as events. Modules that act on each sample by itself (convolution, pooling, Flatten, activations,
    and BatchNorm and Dropout in eval mode) run once on (T * B, ...). Everything else is applied step by step,
    which keeps its per-step meaning; with more than one random layer the random numbers come in another
    order than in the loop. ``fuse_time=False`` is the step loop itself.

    Args:
        net: an ``nn.Sequential``, Norse's ``SequentialState``, or one neuron module. snnTorch neurons need
            ``init_hidden=True``; the last layer may also return its membrane.
        x: (T, B, ...), dense, SpikeTrain, torch COO, torch CSR or ``torch_sparse.SparseTensor``, of a floating dtype.
        state: what an earlier call returned, one entry per layer. Default: where the step loop would start,
            snnTorch's hidden states or Norse's initial ones. snnTorch's hidden states are left as the loop
            leaves them.
        lengths: how many steps each sample has, B whole numbers from 0 to T (list, numpy array or tensor). Every
            sample runs for its own steps and for no other: its spikes and membrane are 0 after them, its state is
            that after its last step. Not for layers that look at several samples or keep a state of their own.
        events: return the spikes of the last layer as a :class:`~snn_sparse_plugin.SpikeTrain`.
        batch_size: B, for a two-dimensional sparse matrix (B * T, N).
        **overrides: options of :class:`~snn_sparse_plugin.SparseConfig` for this call.

    Returns:
        ``(spikes, mem, state)``: spikes and membrane (T, B, N...) of the last layer; of a readout, the spikes
        are its output. ``mem`` is None where the last layer has no membrane. ``state`` has one entry per
        layer: Norse's state tuples, dicts of snnTorch's hidden states by name, None for stateless layers.

    Raises:
        InputError: shapes, dtypes or lengths that do not fit, or a network that is no sequence of layers. Hidden
            states are then as before the call.
        ConfigError: an unknown option, or a value outside its range.
        UnsupportedError: no backend has that name, or the one named cannot run a layer.

    Example:
        >>> import snntorch as snn
        >>> net = nn.Sequential(
        ...     nn.Linear(30, 20), snn.Leaky(beta=0.9, init_hidden=True),
        ...     nn.Linear(20, 10), snn.Leaky(beta=0.9, init_hidden=True, output=True))
        >>> spikes, mem, state = unroll(net, (torch.rand(50, 4, 30) < 0.05).float())
        >>> spikes.shape, mem.shape
        (torch.Size([50, 4, 10]), torch.Size([50, 4, 10]))
        >>> spikes, mem, state = unroll(net, torch.ones(50, 4, 30), lengths=[50, 7, 20, 31])
        >>> mem.detach().abs().sum(2)[-1].nonzero().flatten().tolist()  # who is still running at the last step
        [0]
    """
    config = current_config().updated(**overrides)
    flow = _input(x, batch_size)
    steps = None if lengths is None else read_lengths(lengths, *flow.shape[:2])
    form = form_of(flow, config, overrides, events) if steps is None else None
    known = recall(net, form)
    layers = _layers(net, loaded_adapters()) if known is None else known.layers
    warn_of_gradients_that_stay_apart(net)
    if state is not None and len(state) != len(layers):
        raise InputError(f"state has {len(state)} entries, the network has {len(layers)} layers.")
    states = [None] * len(layers) if state is None else list(state)
    before = [layer.adapter.read_state(layer.module) if layer.adapter else None for layer in layers]
    try:
        found = None if known is None else known.run(flow, states, events)
        if found is None:
            per_step, fused = _checked(layers), list[FusedCall]()
            with entered(config, {name: getattr(config, name) for name in overrides}):
                if steps is None:
                    found = run(layers, flow, states, per_step=per_step, events=events, fused=fused)
                else:
                    found = run_ragged(layers, flow, states, steps, per_step=per_step, events=events)
            if known is None:
                keep(net, form, layers, fused)
    except BaseException:
        _write(layers, before)  # layers may have moved on
        raise
    result = Unrolled(*found)
    _write(layers, result.state)
    return result


def _checked(layers: list[Layer]) -> bool:
    """Whether the layers of this sequence are called step by step, not with all steps.

    Raises:
        InputError: one that cannot stand at its place.
    """
    adapters = loaded_adapters()
    for index, layer in enumerate(layers):
        if layer.adapter is not None:
            problem = layer.adapter.check_in_sequence(layer.module, index == len(layers) - 1)
            if problem:
                raise InputError(f"{layer.label} {problem}.")
        elif _gives_a_tuple(layer, adapters):
            raise InputError(
                f"{layer.label} hands its state on beside its output. Write Norse's LIF in the place of a lifted "
                f"LIFCell, and so for other cells, or run the network in sparse_mode()."
            )
    return not _takes_sequence(layers, adapters)


def _input(x: Any, batch_size: int | None) -> Flow:
    if is_sparse_input(x):
        return as_spike_train(x, batch_size)
    if not isinstance(x, Tensor):
        raise InputError(f"x must be a tensor or a SpikeTrain, got {type(x).__name__}.{_instead_of(x)}")
    check_float(x, "x")
    if x.dim() < 3:
        raise InputError(
            f"x must have shape (T, B, ...), steps first, then samples, got {tuple(x.shape)}."
            + (" One sample is x.unsqueeze(1), one step x.unsqueeze(0)." if x.dim() == 2 else "")
        )
    return x


def _instead_of(x: Any) -> str:
    if isinstance(x, nn.Module):
        return " The network comes first: unroll(net, x)."
    return " Write torch.from_numpy(x)." if hasattr(x, "__array_interface__") else ""


def _write(layers: list[Layer], states: Sequence[Any]) -> None:
    for layer, state in zip(layers, states, strict=True):
        if layer.adapter is not None and state is not None:
            layer.adapter.write_state(layer.module, state)


def _layers(net: nn.Module, adapters: list[Adapter]) -> list[Layer]:
    container = next((a for a in adapters if a.container(net)), None)
    if container is None and not _is_sequential(net):
        if any(a.owns(net) for a in adapters):
            return [_layer("", net, adapters)]
        advice = "Pass the sequential part of the network, or use sparse_mode() around the step loop."
        raise InputError(
            f"unroll runs an nn.Sequential, Norse's SequentialState or a neuron, got {type(net).__name__}. "
            f"{what_to_write(net) or advice}"
        )
    if has_hooks(net):
        raise InputError(
            "the network itself has forward or backward hooks, which a layer-by-layer run would skip: "
            "register them on its layers, or call it step by step."
        )
    return _flatten(net, "", container, adapters)


def _flatten(net: nn.Module, prefix: str, container: Adapter | None, adapters: list[Adapter]) -> list[Layer]:
    found = []
    # _modules, as named_children() skips a module that is used twice
    for index, (name, child) in enumerate(net._modules.items()):
        assert child is not None
        if container is None and _is_sequential(child) and not has_hooks(child):
            found += _flatten(child, f"{prefix}{name}.", None, adapters)
            continue
        layer = _layer(prefix + name, child, adapters)
        layer.stateful = layer.adapter is None and container is not None and container.stateful(net, index)
        found.append(layer)
    return found


def _is_sequential(module: nn.Module) -> bool:
    return type(module).forward is nn.Sequential.forward and "forward" not in vars(module)


def _layer(name: str, module: nn.Module, adapters: list[Adapter]) -> Layer:
    owner = next((a for a in adapters if a.owns(module)), None)
    wrapper = next((a for a in adapters if a.unwrap(module) is not None), None)
    return Layer(name, module, owner, wrapper)


def _takes_sequence(layers: list[Layer], adapters: list[Adapter]) -> bool:
    return any(a.takes_sequence(layer.module) for a in adapters for layer in layers)


def _gives_a_tuple(layer: Layer, adapters: list[Adapter]) -> bool:
    """Whether its library alone knows what it hands on: Norse's Lift of a cell gives a state as well, which the next
    Lift leaves out."""
    ours = layer.adapter is not None or layer.wrapper is not None or layer.stateful
    return not ours and any(a.takes_sequence(layer.module) for a in adapters)


# --- what the hooks on upstream's sequence modules call ---


def _hooked_neuron(module: nn.Module, x: Tensor, state: Any) -> tuple[Tensor, Any] | None:
    """Norse's LIF, LI, ... called on (T, B, N...), or on (T, N) as a batch of one."""
    if not _fits(module, x, at_least=2):
        return None
    layer, single = _layer("", module, loaded_adapters()), x.dim() == 2
    if single:
        if not len(x):  # upstream refuses
            return None
        x = x.unsqueeze(1)
        state = _mapped(state, lambda s: s.unsqueeze(0) if s.dim() else s)
    try:
        found = run_neuron(layer, x, state)
    except NonFiniteError:  # which upstream's own forward carries on
        return None
    if found is None:
        return None
    out: Tensor = found.flow  # type: ignore[assignment]
    if single:
        return out.squeeze(1), _mapped(found.state, lambda s: s.squeeze(0))
    return out, found.state


def _mapped(state: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A state tuple, which may be nested, with each tensor changed."""
    if isinstance(state, Tensor):
        return change(state)
    return type(state)(*(_mapped(part, change) for part in state)) if isinstance(state, tuple) else state


def _hooked_container(module: nn.Module, x: Tensor, state: Any) -> tuple[Tensor, Any] | None:
    """Norse's SequentialState over sequence modules."""
    if not _fits(module, x):
        return None
    adapters = loaded_adapters()
    container = next(a for a in adapters if a.container(module))
    layers = _flatten(module, "", container, adapters)
    if not _takes_sequence(layers, adapters) or any(_gives_a_tuple(layer, adapters) for layer in layers):
        return None
    states = [None] * len(layers) if state is None else list(state)
    try:
        spikes, _, states = run(layers, x, states, per_step=False, want_mem=False)
    except NonFiniteError:
        return None
    return spikes, states  # type: ignore[return-value]


def _fits(module: nn.Module, x: Any, at_least: int = 3) -> bool:
    config = config_of(module)
    if config is None:
        return False
    why = _why_not(x, at_least) if config.fuse_time else "fuse_time=False"
    if why:
        refuse(module, why)
    return not why


def _why_not(x: Any, at_least: int) -> str:
    if torch._C._are_functorch_transforms_active():  # the fused op's backward is no functorch rule
        return "called inside a transform of torch.func"
    if not isinstance(x, Tensor):
        return f"an input that is a {type(x).__name__}, not a tensor"
    if x.layout != torch.strided:
        return f"an input of layout {x.layout}, where dense ones are fused"
    if x.dim() < at_least:
        return f"an input of shape {tuple(x.shape)}, where (T, B, ...) is fused"
    return "" if x.is_floating_point() else f"an input of {x.dtype}, where float32 and float64 are fused"


hooked = SimpleNamespace(
    install=install, neuron=_hooked_neuron, container=_hooked_container, step=step, settle=settle
)
