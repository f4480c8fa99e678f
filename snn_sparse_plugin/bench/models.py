"""What each provider computes with: the network of a problem in this package, snnTorch, Norse and SpikingJelly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.dynamics import NeuronParams, NeuronSpec
from ..core.errors import MissingDependencyError
from ..core.spikes import SpikeTrain
from ..core.surrogates import Surrogate
from ..ops.spiking_conv import autograd, spiking_conv, takes_events
from ..ops.spiking_conv.geometry import geometry
from ..ops.spiking_layer import spiking_layer
from .layers import Layer
from .problem import Config, Problem


class Model(NamedTuple):
    """A network: ``spikes(x)`` -> (T, B, N) of the last layer, from the input form the provider takes.

    With a readout they are its membrane.
    """

    spikes: Callable[[Any], Tensor]
    parameters: list[Tensor]
    x: Any


def _require(module: str, install: str) -> Any:
    try:
        return import_module(module)
    except (ImportError, RuntimeError, OSError) as error:  # a broken installation fails in its own way
        raise MissingDependencyError(
            f"{module} cannot be imported: pip install {install} ({error})"
        ) from error


def _synapses(
    config: Config, problem: Problem, factors: Sequence[float] | None = None
) -> list[list[nn.Module]]:
    """For each layer the modules before its neurons: a linear layer, or a convolution and its pool."""
    found = []
    factors = factors or [1.0] * len(problem.weights)
    for (layer, size), weight, factor in zip(config.stages, problem.weights, factors, strict=True):
        modules = layer.modules(size, config.device)
        with torch.no_grad():
            for module in modules:
                if isinstance(module, nn.Linear | nn.Conv2d):
                    module.weight.copy_(weight * factor)
                    module.bias.zero_()  # type: ignore[union-attr]
        found.append(modules)
    return found


def _resets(config: Config, problem: Problem) -> list[Literal["none", "subtract", "zero"]]:
    """Of Leaky, per layer; one that is never reset is the readout."""
    spiking = len(problem.weights) - config.readout
    return [config.reset] * spiking + ["none"] * config.readout


def _interleave(synapses: list[list[nn.Module]], neurons: list[Any]) -> list[nn.Module]:
    pairs = zip(synapses, neurons, strict=True)
    return [module for modules, neuron in pairs for module in (*modules, neuron)]


def _joined(synapses: list[list[nn.Module]], join: Callable[..., nn.Module]) -> list[list[nn.Module]]:
    """With ``join(*modules)`` in the place of the modules of each layer that is not linear alone."""
    return [
        modules if len(modules) == 1 and isinstance(modules[0], nn.Linear) else [join(*modules)]
        for modules in synapses
    ]


# --- this package ---


def unrolled(*, events: bool = False, exact: bool = False, backend: str = "auto") -> Callable:
    """A swapped-import snnTorch network run by ``unroll``."""

    def build(config: Config, problem: Problem) -> Model:
        _require("snntorch", "snntorch")
        from .. import snntorch as snn
        from ..fusion.sequence import unroll

        reset = import_module("snntorch.utils").reset
        spike_grad = _spike_grad(config)
        neurons = [
            snn.Leaky(beta=config.beta, spike_grad=spike_grad, init_hidden=True, reset_mechanism=mechanism)
            for mechanism in _resets(config, problem)
        ]
        neurons[-1].output = config.readout
        net = nn.Sequential(*_interleave(_synapses(config, problem), neurons)).to(config.device)
        options: dict[str, Any] = {"backprop_threshold": None if exact else config.window, "backend": backend}
        x = SpikeTrain.from_dense(problem.x) if events else problem.x

        def spikes(x: Any) -> Tensor:
            reset(net)
            out = unroll(net, x, **options)
            if not config.readout:
                return out.spikes
            assert out.mem is not None
            return (1 - config.beta) * out.mem

        return Model(spikes, list(net.parameters()), x)

    return build


def op_network(config: Config, problem: Problem) -> Model:
    """The network as calls of the op: what ``unroll`` does, for where no neuron library is installed."""
    options: dict[str, Any] = op_options(config)
    specs = [NeuronSpec(reset=reset, spiking=reset != "none") for reset in _resets(config, problem)]
    layers = [layer for layer, _ in config.stages]
    weights = [weight.clone().requires_grad_() for weight in problem.weights]
    biases = [torch.zeros(len(weight), device=weight.device, requires_grad=True) for weight in weights]

    def spikes(x: Any) -> Tensor:
        for k, (layer, weight, bias, spec) in enumerate(zip(layers, weights, biases, specs, strict=True), 1):
            kind: dict[str, Any] = {"spec": spec, "events": k < len(layers)} | options
            if layer.kernel:
                x = spiking_conv(x, weight, bias, padding=layer.padding, pool=_pool(layer), **kind).spikes
            else:
                x = x.flatten(2) if isinstance(x, Tensor) else x.flatten()
                x = spiking_layer(x, weight, bias, **kind).spikes
        return (1 - config.beta) * x if config.readout else x

    pairs = zip(weights, biases, strict=True)
    return Model(spikes, [p for pair in pairs for p in pair], problem.x)


def _pool(layer: Layer) -> nn.Module | None:
    return None if layer.pool == 1 else nn.MaxPool2d(layer.pool)


def op(path: str) -> Callable:
    """The op alone, one layer: over events, over the dense product, or left to choose."""

    def build(config: Config, problem: Problem) -> Model:
        ((layer, _),), (weight,) = config.stages, problem.weights
        weight = weight.clone().requires_grad_()
        bias = torch.zeros(weight.shape[0], device=weight.device, requires_grad=True)
        options: dict[str, Any] = op_options(config)

        def linear(x: Tensor) -> Tensor:
            if path == "events":
                return spiking_layer(SpikeTrain.from_dense(x), weight, bias, **options).spikes
            if path == "dense":
                return spiking_layer(F.linear(x, weight, bias), **options).spikes
            return spiking_layer(x, weight, bias, **options).spikes

        def convolution(x: Tensor) -> Tensor:
            form: dict[str, Any] = {"padding": layer.padding, "pool": _pool(layer)}
            if path == "auto":
                return spiking_conv(x, weight, bias, **form, **options).spikes
            # what the op does once it has chosen
            train = SpikeTrain.from_dense(x) if path == "events" else x
            backend = takes_events(train) if path == "events" else None
            shape = geometry(*(train, weight, bias), stride=1, dilation=1, groups=1, name=path, **form)
            return spiking_layer(autograd.convolve(shape, train, weight, bias, backend), **options).spikes

        return Model(convolution if layer.kernel else linear, [weight, bias], problem.x)

    return build


def _spike_grad(config: Config) -> Any:
    """snnTorch's surrogate."""
    return getattr(import_module("snntorch.surrogate"), config.surrogate)(config.slope)


def op_options(config: Config) -> dict[str, Any]:
    return {
        "params": NeuronParams(mem=config.beta),
        "surrogate": Surrogate(config.surrogate, (config.slope,)),
        "backprop_threshold": config.window,
    }


# --- the others ---


class TutorialNet(nn.Module):
    """snnTorch as its tutorials write it: a loop over steps, every layer called once per step."""

    def __init__(self, config: Config, problem: Problem) -> None:
        super().__init__()
        snntorch = _require("snntorch", "snntorch")
        spike_grad = _spike_grad(config)
        synapses = _joined(_synapses(config, problem), nn.Sequential)
        self.fc = nn.ModuleList(module for (module,) in synapses)
        self.lif = nn.ModuleList(
            snntorch.Leaky(beta=config.beta, spike_grad=spike_grad, reset_mechanism=reset)
            for reset in _resets(config, problem)
        )
        self.readout, self.beta = config.readout, config.beta

    def forward(self, x: Tensor) -> Tensor:
        mems = [lif.reset_mem() for lif in self.lif]  # type: ignore[operator]
        record = []
        for spikes in x.unbind(0):
            for k, (fc, lif) in enumerate(zip(self.fc, self.lif, strict=True)):
                spikes, mems[k] = lif(fc(spikes), mems[k])
            record.append(mems[-1] if self.readout else spikes)
        return (1 - self.beta) * torch.stack(record) if self.readout else torch.stack(record)


def snntorch_loop(config: Config, problem: Problem) -> Model:
    net = TutorialNet(config, problem).to(config.device)
    return Model(net, list(net.parameters()), problem.x)


def fused_loop(config: Config, problem: Problem) -> Model:
    from ..mode import sparse_mode

    net = TutorialNet(config, problem).to(config.device)

    def spikes(x: Tensor) -> Tensor:
        with sparse_mode(backprop_threshold=config.window):
            return net(x)  # type: ignore[no-any-return]

    return Model(spikes, list(net.parameters()), problem.x)


def compiled_loop(config: Config, problem: Problem) -> Model:
    net = TutorialNet(config, problem).to(config.device)
    return Model(torch.compile(net), list(net.parameters()), problem.x)


def norse_sequence(config: Config, problem: Problem) -> Model:
    norse = _require("norse.torch", "norse")
    # dt tau_mem_inv = 1 - beta, a synapse that decays within a step, and weights larger by 1 / (1 - beta):
    # the membrane of Leaky, apart from the reset to zero
    times = {
        "tau_syn_inv": torch.tensor(1000.0),
        "tau_mem_inv": torch.tensor((1 - config.beta) * 1000),
    }
    p = norse.LIFParameters(**times, v_th=torch.tensor(1.0), alpha=torch.tensor(config.slope))
    factors = [1 / (1 - config.beta)] * len(problem.weights)
    neurons = [norse.LIF(p) for _ in factors]
    if config.readout:  # its current is scaled alike
        factors[-1], neurons[-1] = 1.0, norse.LI(norse.LIParameters(**times))
    # its own way with modules that know no time
    synapses = _joined(
        _synapses(config, problem, factors), lambda *modules: norse.Lift(nn.Sequential(*modules))
    )
    net = norse.SequentialState(*_interleave(synapses, neurons)).to(config.device)
    return Model(lambda x: net(x)[0], list(net.parameters()), problem.x)


def spikingjelly_modules(config: Config, problem: Problem) -> Model:
    sj = _require("spikingjelly.activation_based", "'spikingjelly>=2.0.0'")
    neuron, surrogate, functional, layer = (
        import_module(f"{sj.__name__}.{name}") for name in ("neuron", "surrogate", "functional", "layer")
    )
    spike = surrogate.ATan if config.surrogate == "atan" else surrogate.SoftSign
    neurons = [
        neuron.LIFNode(
            tau=1 / (1 - config.beta),
            decay_input=False,
            v_threshold=1.0,
            v_reset=0.0 if config.reset == "zero" else None,
            detach_reset=True,
            surrogate_function=spike(alpha=config.slope),
            step_mode="m",
        )
        for _ in problem.weights
    ]
    if config.readout:
        neurons[-1] = neuron.NonSpikingLIFNode(tau=1 / (1 - config.beta))
    synapses = _joined(_synapses(config, problem), layer.SeqToANNContainer)
    net = nn.Sequential(*_interleave(synapses, neurons)).to(config.device)

    def spikes(x: Tensor) -> Tensor:
        functional.reset_net(net)
        out = net(x)
        return torch.stack(out) if config.readout else out

    return Model(spikes, list(net.parameters()), problem.x)


class IndexedLayer(nn.Module):
    """The dense loop as published with [Perez-Nieves & Goodman 2021]: ``h[:, t]`` at every step.

    Under autograd each index makes a zero tensor of the size of ``h``, so its backward grows with T squared.
    """

    def __init__(self, config: Config, weight: Tensor) -> None:
        super().__init__()
        self.fc = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device)
        with torch.no_grad():
            self.fc.weight.copy_(weight)
            self.fc.bias.zero_()
        self.beta, self.spike = config.beta, Surrogate(config.surrogate, (config.slope,))

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc(x.transpose(0, 1))
        mem = torch.zeros_like(h[:, 0])
        record = []
        for t in range(h.shape[1]):
            reset = (mem.detach() > 1).to(mem.dtype)
            mem = self.beta * mem + h[:, t] - reset
            record.append(self.spike(mem - 1))
        return torch.stack(record)
