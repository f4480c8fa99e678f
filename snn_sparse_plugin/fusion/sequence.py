"""Run a sequential network over all time steps, layer by layer, with the fused op."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..adapters import Adapter, Neuron, config_of, entered, has_hooks, loaded_adapters
from ..config import current_config
from ..errors import InputError
from ..ops import spiking_layer
from ..spikes import SpikeTrain, as_spike_train, check_float, is_sparse_input
from .modules import applies_per_sample, is_plain_linear, keeps_events

Flow = Tensor | SpikeTrain

# a one-to-one recurrence becomes a diagonal matrix: beyond this many neurons it is stepped instead
MAX_DIAGONAL = 1024


class Unrolled(NamedTuple):
    """``spikes`` and ``mem`` (T, B, N...) of the last layer, and ``state``, one entry per layer."""

    spikes: Any
    mem: Tensor | None
    state: list[Any]


@dataclass
class Layer:
    name: str
    module: nn.Module
    adapter: Adapter | None = None  # the owner of a neuron
    wrapper: Adapter | None = None  # the owner of a wrapper such as Lift
    stateful: bool = False  # called as module(x, state) although no adapter owns it

    @property
    def label(self) -> str:
        return f"{self.name} ({type(self.module).__name__})" if self.name else type(self.module).__name__


def unroll(
    net: nn.Module,
    x: Any,
    state: Sequence[Any] | None = None,
    *,
    events: bool = False,
    batch_size: int | None = None,
    **overrides: Any,
) -> Unrolled:
    """Run a sequential network over all steps at once; the result is that of the step loop.

    A ``Linear`` directly before a neuron and the neuron are one fused call over all steps, and hidden spikes travel
    as events. Modules that act on each sample by itself (convolution, pooling, Flatten, activations, and BatchNorm
    and Dropout in eval mode) run once on (T * B, ...). Everything else is applied step by step, so that its
    per-step meaning is kept; with more than one random layer the order of random numbers differs from the loop's.

    Args:
        net: an ``nn.Sequential``, Norse's ``SequentialState``, or one neuron module. snnTorch neurons need
            ``init_hidden=True``; the last layer may also return its membrane.
        x: (T, B, ...), dense, SpikeTrain, torch COO, torch CSR or ``torch_sparse.SparseTensor``.
        state: what an earlier call returned: one entry per layer. Default: as the step loop would start, from
            snnTorch's hidden states or Norse's initial ones. snnTorch's hidden states are left as the loop leaves
            them.
        events: return the spikes of the last layer as a :class:`~snn_sparse_plugin.SpikeTrain`.
        batch_size: B, for a two-dimensional sparse matrix (B * T, N).
        **overrides: options of :class:`~snn_sparse_plugin.SparseConfig` for this call.

    Returns:
        ``(spikes, mem, state)``: spikes and membrane (T, B, N...) of the last layer; ``mem`` is None where the last
        layer has none. For a readout the spikes are its output.

    Raises:
        InputError: shapes or dtypes that do not fit, or a network that is no sequence of layers.

    Example:
        >>> import snntorch as snn
        >>> net = nn.Sequential(nn.Linear(30, 20), snn.Leaky(beta=0.9, init_hidden=True),
        ...                     nn.Linear(20, 10), snn.Leaky(beta=0.9, init_hidden=True, output=True))
        >>> spikes, mem, state = unroll(net, (torch.rand(50, 4, 30) < 0.05).float())
        >>> spikes.shape, mem.shape
        (torch.Size([50, 4, 10]), torch.Size([50, 4, 10]))
    """
    config = current_config().updated(**overrides)
    flow = _input(x, batch_size)
    adapters = loaded_adapters()
    layers = _layers(net, adapters)
    if state is not None and len(state) != len(layers):
        raise InputError(f"state has {len(state)} entries, the network {len(layers)} layers.")
    per_step = not any(a.takes_sequence(layer.module) for a in adapters for layer in layers)
    _check(layers, per_step)
    with entered(config, overrides):
        return _transaction(layers, flow, state, per_step=per_step, events=events)


def _input(x: Any, batch_size: int | None) -> Flow:
    if is_sparse_input(x):
        return as_spike_train(x, batch_size)
    if not isinstance(x, Tensor):
        raise InputError(f"x must be a tensor or a SpikeTrain, got {type(x).__name__}.")
    check_float(x, "x")
    if x.dim() < 3:
        raise InputError(f"x must have shape (T, B, ...), got {tuple(x.shape)}.")
    return x


def _layers(net: nn.Module, adapters: list[Adapter]) -> list[Layer]:
    container = next((a for a in adapters if a.container(net)), None)

    def layer(name: str, module: nn.Module, index: int = 0) -> Layer:
        owner = next((a for a in adapters if a.owns(module)), None)
        wrapper = next((a for a in adapters if a.unwrap(module) is not None), None)
        stateful = owner is None and container is not None and container.stateful(net, index)
        return Layer(name, module, owner, wrapper, stateful)

    def flatten(module: nn.Module, prefix: str) -> list[Layer]:
        found = []
        for name, child in module._modules.items():  # named_children() would skip a module used twice
            plain = type(child).forward is nn.Sequential.forward and "forward" not in vars(child)
            if plain and not has_hooks(child) and container is None:
                found += flatten(child, f"{prefix}{name}.")
            else:
                found.append(layer(prefix + name, child, len(found)))
        return found

    if container is not None or type(net).forward is nn.Sequential.forward:
        if has_hooks(net):
            raise InputError(
                "the network itself has forward or backward hooks, which a layer-by-layer run would skip: "
                "register them on its layers, or call it step by step."
            )
        return flatten(net, "")
    if any(a.owns(net) for a in adapters):
        return [layer("", net)]
    raise InputError(
        f"unroll runs an nn.Sequential, Norse's SequentialState or a neuron, got {type(net).__name__}. "
        f"Pass the sequential part of the network, or use sparse_mode() around the step loop."
    )


def _check(layers: list[Layer], per_step: bool) -> None:
    for index, layer in enumerate(layers):
        if layer.adapter is not None:
            problem = layer.adapter.check_in_sequence(layer.module, index == len(layers) - 1)
            if problem:
                raise InputError(f"{layer.label} {problem}.")


def _transaction(
    layers: list[Layer], x: Flow, state: Sequence[Any] | None, *, per_step: bool, events: bool
) -> Unrolled:
    """Run; hidden states change only if everything succeeded."""
    states = [None] * len(layers) if state is None else list(state)
    before = [layer.adapter.read_state(layer.module) if layer.adapter else None for layer in layers]
    try:
        result = _run(layers, x, states, per_step=per_step, events=events)
        for layer, final in zip(layers, result.state, strict=True):
            if layer.adapter is not None and final is not None:
                layer.adapter.write_state(layer.module, final)
        return result
    except BaseException:
        for layer, saved in zip(layers, before, strict=True):
            if layer.adapter is not None and saved is not None:
                layer.adapter.write_state(layer.module, saved)
        raise


def _run(
    layers: list[Layer],
    x: Flow,
    states: list[Any],
    *,
    per_step: bool,
    events: bool = False,
    want_mem: bool = True,
) -> Unrolled:
    if per_step and not current_config().fuse_time:
        return _loop(layers, x, states, events)
    neurons = [_fusable(layer, per_step) for layer in layers]
    flow, mem, index = x, None, 0
    while index < len(layers):
        layer, linear = layers[index], None
        if neurons[index] is None and _joins_next(layers, neurons, index, flow, per_step):
            linear = _linear(layer, per_step)
            index += 1
            layer = layers[index]
        neuron, last = neurons[index], index == len(layers) - 1
        name = _name(layers, index, linear is not None)
        if neuron is not None:
            call = _FusedCall(layer, neuron, linear, name, states[index], per_step)
            as_events = events if last else _takes_events(layers, neurons, index + 1, per_step)
            found = call.run(flow, as_events, want_mem and last)
            if found is None:  # this input needs upstream's own step
                flow = _apply(layers[index - 1], flow, None, per_step)[0] if linear is not None else flow
                found = _apply(layer, flow, states[index], per_step, want_mem and last)
        else:
            found = _apply(layer, flow, states[index], per_step, want_mem and last)
        flow, mem, states[index] = found
        index += 1
    return Unrolled(_as_events(flow, layers) if events else _dense(flow), mem, states)


# --- what can be fused ---


def _fusable(layer: Layer, per_step: bool) -> Neuron | None:
    if layer.adapter is None or has_hooks(layer.module):
        return None
    config = config_of(layer.module)
    if config is None or not config.fuse_time or layer.adapter.takes_sequence(layer.module) == per_step:
        return None
    neuron = layer.adapter.neuron(layer.module)
    return None if isinstance(neuron, str) else neuron


def _linear(layer: Layer, per_step: bool) -> nn.Linear | None:
    """The plain Linear of a layer, bare or inside a wrapper that applies it at every step."""
    module = layer.module
    if layer.wrapper is not None and not per_step and not has_hooks(module):
        module = layer.wrapper.unwrap(module)  # type: ignore[assignment]
    return module if is_plain_linear(module) else None  # type: ignore[return-value]


def _joins_next(
    layers: list[Layer], neurons: list[Neuron | None], index: int, flow: Flow, per_step: bool
) -> bool:
    if index + 1 >= len(layers) or len(flow.shape) != 3:
        return False
    neuron = neurons[index + 1]
    if neuron is None or neuron.input_weight is not None or _linear(layers[index], per_step) is None:
        return False
    # under autocast the product has another dtype: the Linear itself runs then
    return not torch.is_autocast_enabled(flow.device.type)


def _takes_events(layers: list[Layer], neurons: list[Neuron | None], index: int, per_step: bool) -> bool:
    while index < len(layers) and keeps_events(layers[index].module):
        index += 1
    if index >= len(layers):
        return False
    neuron = neurons[index]
    if neuron is not None:
        return neuron.input_weight is not None
    following = neurons[index + 1] if index + 1 < len(layers) else None
    joins = following is not None and following.input_weight is None
    return joins and _linear(layers[index], per_step) is not None


def _name(layers: list[Layer], index: int, joined: bool) -> str:
    return f"{layers[index - 1].name}→{layers[index].name}" if joined else layers[index].label


@dataclass
class _FusedCall:
    layer: Layer
    neuron: Neuron
    linear: nn.Linear | None
    name: str
    state: Any
    per_step: bool

    def run(self, flow: Flow, events: bool, want_mem: bool) -> tuple[Flow, Tensor | None, Any] | None:
        """One call of the op; None where only upstream's own step does what upstream does."""
        neuron, module, adapter = self.neuron, self.layer.module, self.layer.adapter
        assert adapter is not None
        weight, bias = neuron.input_weight, None
        if self.linear is not None:
            weight, bias = self.linear.weight, self.linear.bias
        if weight is not None:
            check_features(self.name, flow, weight.shape[1])
        if weight is not None and len(flow.shape) != 3:
            return None
        T, B = flow.shape[:2]
        features = tuple(flow.shape[2:]) if weight is None else (weight.shape[0],)
        shape = (B, *features) if self.per_step else (T, B, *features)
        template = torch.empty((), dtype=flow.dtype, device=flow.device).expand(shape)
        recurrent = _recurrent_weight(neuron, features)
        if flow.dtype not in (torch.float32, torch.float64) or (neuron.recurrent and recurrent is None):
            return None
        if weight is not None and torch.is_autocast_enabled(flow.device.type):
            return None
        start, initial = adapter.initial_state(module, template, self.state)
        if not _same_dtype(template, [*start, *neuron.params]):
            return None
        graded = neuron.scale is not None
        out = spiking_layer(
            flow,
            weight,
            bias,
            spec=neuron.spec,
            params=neuron.params,
            surrogate=neuron.surrogate,
            recurrent_weight=recurrent,
            recurrent_bias=neuron.recurrent_bias,
            state=start,
            events=events and neuron.spec.spiking and not graded,
            return_mem=want_mem,
            name=self.name,
            **_options(module),
        )
        spikes = out.spikes * neuron.scale if graded else out.spikes
        state = adapter.final_state(module, out.state, initial) if T else self.state
        return spikes, out.mem, state


def _options(module: nn.Module) -> dict[str, Any]:
    config = config_of(module)
    return {} if config is None else dict(vars(config))


def _recurrent_weight(neuron: Neuron, features: tuple[int, ...]) -> Tensor | None:
    if neuron.recurrent_diagonal is not None:
        diagonal = neuron.recurrent_diagonal.expand(features).reshape(-1)
        return diagonal.diag_embed() if diagonal.numel() <= MAX_DIAGONAL else None
    return neuron.recurrent_weight if len(features) == 1 else None


def _same_dtype(template: Tensor, tensors: list[Any]) -> bool:
    # a state or parameter of higher precision would promote upstream's membrane
    present = [t for t in tensors if isinstance(t, Tensor)]
    return all(torch.result_type(template, t) == template.dtype for t in present)


def check_features(name: str, flow: Flow, expected: int) -> None:
    if flow.shape[-1] != expected:
        raise InputError(
            f"{name}: input has shape {tuple(flow.shape)}, weight expects {expected} features. "
            f"Check the encoder's number of channels or the size of the layer before."
        )


# --- everything else ---


def _apply(
    layer: Layer, flow: Flow, state: Any, per_step: bool, want_mem: bool = False
) -> tuple[Flow, Tensor | None, Any]:
    """A layer that is not fused, with the meaning that upstream gives it."""
    module, hooked = layer.module, has_hooks(layer.module)
    if isinstance(flow, SpikeTrain):
        kept = None if hooked else keeps_events(module, flow, per_step)
        if kept:
            return kept, None, None
        flow = flow.to_dense()
    if is_plain_linear(module) or isinstance(module, nn.Linear):
        check_features(layer.label, flow, module.in_features)  # type: ignore[arg-type]
    if not per_step:
        inner = layer.wrapper.unwrap(module) if layer.wrapper is not None and not hooked else None
        if inner is not None and applies_per_sample(inner):
            return _once(inner, flow), None, None
        if layer.adapter is not None or layer.stateful:
            out, state = module(flow, state)
            return out, None, state
        return module(flow), None, None
    if layer.adapter is None and not layer.stateful and applies_per_sample(module):
        return _once(module, flow), None, None
    return _steps(layer, flow, state, want_mem)


def _once(module: nn.Module, flow: Tensor) -> Tensor:
    """A per-sample module on all steps at once; on one step where all are the same."""
    T, B = flow.shape[:2]
    if T > 1 and flow.stride(0) == 0:
        out = module(flow[0])
        return out.expand(T, *out.shape)
    out = module(flow.flatten(0, 1))
    return out.view(T, B, *out.shape[1:]) if out.is_contiguous() else out.unflatten(0, (T, B))


def _steps(layer: Layer, flow: Tensor, state: Any, want_mem: bool) -> tuple[Tensor, Tensor | None, Any]:
    if not len(flow):
        return _empty(layer, flow, state), None, state
    if layer.adapter is not None and state is not None:
        layer.adapter.write_state(layer.module, state)
    outs, mems = [], []
    for x in flow.unbind(0):
        out, mem, state = _step(layer, x, state)
        outs.append(out)
        mems.append(mem if want_mem else None)
    if layer.adapter is not None:
        kept = layer.adapter.read_state(layer.module)
        state = state if kept is None else kept
    mem = None if mems[0] is None else torch.stack(mems)  # type: ignore[arg-type]
    return torch.stack(outs), mem, state


def _step(layer: Layer, x: Tensor, state: Any) -> tuple[Tensor, Tensor | None, Any]:
    if layer.adapter is not None:
        return layer.adapter.step(layer.module, x, state)
    if layer.stateful:
        out, state = layer.module(x, state)
        return out, None, state
    out = layer.module(x)
    if not isinstance(out, Tensor):
        raise InputError(
            f"{layer.label} returned a {type(out).__name__}; between the layers of a sequence only tensors pass."
        )
    return out, None, None


def _empty(layer: Layer, flow: Tensor, state: Any) -> Tensor:
    # T = 0: only the shape of a step's output is wanted, and nothing may be changed by asking for it
    with torch.no_grad():
        out = _step(
            Layer(layer.name, copy.deepcopy(layer.module), layer.adapter, stateful=layer.stateful),
            flow.new_zeros(flow.shape[1:]),
            state,
        )[0]
    return out.new_empty(0, *out.shape)


def _loop(layers: list[Layer], x: Flow, states: list[Any], events: bool) -> Unrolled:
    """The step loop itself: ``fuse_time=False``."""
    flow = _dense(x)
    if not len(flow):
        for layer in layers:
            flow = _empty(layer, flow, None)
        return Unrolled(_as_events(flow, layers) if events else flow, None, states)
    for layer, state in zip(layers, states, strict=True):
        if layer.adapter is not None and state is not None:
            layer.adapter.write_state(layer.module, state)
    outs, mems = [], []
    mem: Tensor | None = None
    for h in flow.unbind(0):
        for index, layer in enumerate(layers):
            if isinstance(layer.module, nn.Linear):
                check_features(layer.label, h, layer.module.in_features)
            h, mem, states[index] = _step(layer, h, states[index])
        outs.append(h)
        mems.append(mem)
    for index, layer in enumerate(layers):
        kept = layer.adapter.read_state(layer.module) if layer.adapter is not None else None
        states[index] = states[index] if kept is None else kept
    stacked = None if mems[0] is None else torch.stack(mems)  # type: ignore[arg-type]
    spikes = torch.stack(outs)
    return Unrolled(_as_events(spikes, layers) if events else spikes, stacked, states)


def _dense(flow: Flow) -> Tensor:
    return flow.to_dense() if isinstance(flow, SpikeTrain) else flow


def _as_events(flow: Flow, layers: list[Layer]) -> SpikeTrain:
    if isinstance(flow, SpikeTrain):
        return flow
    neuron = layers[-1].adapter.neuron(layers[-1].module) if layers[-1].adapter is not None else "no neuron"
    if neuron == "no neuron" or (isinstance(neuron, Neuron) and not neuron.spec.spiking):
        raise InputError(f"events=True wants spikes, but the last layer {layers[-1].label} emits none.")
    train = SpikeTrain.from_dense(flow)
    return train._replace(carrier=flow.flatten(2)) if flow.requires_grad else train


# --- what the hooks on sequence modules call ---


def _hooked_neuron(module: nn.Module, x: Tensor, state: Any) -> tuple[Tensor, Any] | None:
    """Norse's LIF, LI, ... called on (T, B, N...): the fused op, or None where upstream's forward must run."""
    adapters = loaded_adapters()
    owner = next(a for a in adapters if a.owns(module))
    # hooks of the module itself are run by the call that brought us here
    config, neuron = config_of(module), owner.neuron(module)
    unfit = not isinstance(x, Tensor) or x.layout != torch.strided or x.dim() < 3 or not x.is_floating_point()
    if config is None or not config.fuse_time or isinstance(neuron, str) or unfit:
        return None
    layer = Layer("", module, owner)
    found = _FusedCall(layer, neuron, None, layer.label, state, per_step=False).run(x, False, False)
    return None if found is None else (_dense(found[0]), found[2])


def _hooked_container(module: nn.Module, x: Tensor, state: Any) -> tuple[Tensor, Any] | None:
    """Norse's SequentialState over sequence modules, or None where it is no such network."""
    config = config_of(module)
    unfit = not isinstance(x, Tensor) or x.layout != torch.strided or x.dim() < 3 or not x.is_floating_point()
    if config is None or not config.fuse_time or unfit:
        return None
    adapters = loaded_adapters()
    container = next(a for a in adapters if a.container(module))
    layers = []
    for index, (name, child) in enumerate(module._modules.items()):
        owner = next((a for a in adapters if a.owns(child)), None)
        wrapper = next((a for a in adapters if a.unwrap(child) is not None), None)
        layers.append(Layer(name, child, owner, wrapper, owner is None and container.stateful(module, index)))
    if not any(a.takes_sequence(layer.module) for a in adapters for layer in layers):
        return None
    states = [None] * len(layers) if state is None else list(state)
    result = _run(layers, x, states, per_step=False, want_mem=False)
    return result.spikes, result.state


hooked = SimpleNamespace(neuron=_hooked_neuron, container=_hooked_container)
